"""Keys without effect: for each rule a configuration in which the key has none, and one in which it has."""

from __future__ import annotations

import pytest

from skillsd.config import RunConfig, load
from skillsd.config.effects import RULES, without_effect, without_effect_in_any

ENDPOINT = ("skills.summariser=openai", "summariser.model=m")

CASES: list[tuple[str, tuple[str, ...], str, tuple[str, ...]]] = [
    # key, settings without effect, reason, settings with effect
    ("teacher.sync_every", ("method=grpo",), "method 'grpo' has no teacher", ("method=skill-sd",)),
    ("teacher.max_group_reward", ("method=skill-grpo",), "has no teacher", ("method=opsd",)),
    ("objective.estimator", ("method=grpo",), "has no teacher", ("method=opd",)),
    ("objective.top_k", ("method=grpo",), "has no teacher", ("method=opd",)),
    ("objective.distil_clamp", ("method=grpo",), "has no teacher", ("method=opd",)),
    ("objective.lambda_sdl", ("method=grpo",), "has no teacher", ("method=skill-sd",)),
    ("objective.lambda_schedule", ("method=grpo",), "has no teacher", ("method=opd",)),
    ("objective.lambda_sdl", ("method=opd",), "method 'opd' is distillation only", ("method=grpo-opsd",)),
    ("teacher.sync_every", ("method=skill-sd-frozen",), "is not synchronised", ("method=teacher-rollouts",)),
    ("teacher.ema", ("method=opd-external", "teacher.model=m"), "is not synchronised", ("method=opd",)),
    ("teacher.min_reading", ("method=skill-sd-frozen",), "is not synchronised", ("method=opd",)),
    ("reading.every", ("method=opd-external", "teacher.model=m"), "no teacher that reads", ("method=opsd",)),
    ("reading.episodes", ("method=grpo",), "no teacher that reads", ("method=skill-sd",)),
    ("reading.episodes", ("reading.every=0",), "reading.every is 0", ("reading.every=0", "teacher.min_reading=0.5")),
    ("reading.source", (), "reading.share is 0", ("reading.share=0.5",)),
    ("reading.replay_weight", (), "reading.replay is 0", ("reading.replay=8",)),
    ("objective.imitation_weight", ("method=skill-sd",), "has no self-imitation", ("method=grpo-imitation",)),
    ("skills.pick", ("method=grpo",), "method 'grpo' uses no skills", ("method=skill-grpo",)),
    ("summariser.prompt", ("method=opsd", *ENDPOINT), "uses no skills", ("method=opd", *ENDPOINT)),
    ("skills.ucb_c", ("skills.pick=best",), "skills.pick is 'best', not UCB", ("skills.pick=ucb-prior",)),
    ("skills.ucb_c", ("skills.pick=last",), "skills.pick is 'last'", ("skills.pick=my.rules:Mine",)),
    ("skills.uplift_episodes", (), "skills.credit is 'reward', not 'uplift'", ("skills.credit=uplift",)),
    ("summariser.base_url", ("skills.summariser=policy",), "skills.summariser is 'policy', not 'openai'", ENDPOINT),
    ("summariser.price_in", (), "skills.summariser is 'rules', not 'openai'", ENDPOINT),
    ("summariser.temperature", (), "'rules', which uses no language model", ("skills.summariser=policy",)),
    ("curriculum.full_at", (), "curriculum.easy_first is false", ("curriculum.easy_first=true",)),
]


def config(*overrides: str) -> RunConfig:
    return load(RunConfig, "sokoban-nano", overrides)


@pytest.mark.parametrize(("key", "without", "reason", "with_effect"), CASES)
def test_each_rule(key: str, without: tuple[str, ...], reason: str, with_effect: tuple[str, ...]) -> None:
    [note] = without_effect(config(*without), [key])
    assert note.startswith(f"{key} has no effect here: ")
    assert reason in note
    assert without_effect(config(*with_effect), [key]) == []


def test_the_cases_cover_every_rule() -> None:
    for names, reason in RULES:
        covered = [
            key
            for key, without, expected, _ in CASES
            if any(key == name or key.startswith(f"{name}.") for name in names)
            and expected in (reason(config(*without), _row(*without)) or "")
        ]
        assert covered, names


def _row(*overrides: str) -> object:
    from skillsd.methods import METHODS

    return METHODS[config(*overrides).method]


def test_a_whole_section_has_no_effect_if_all_its_keys_have_none() -> None:
    assert without_effect(config("method=grpo"), ["teacher", "skills", "model", "training.iterations"]) == [
        "teacher has no effect here: method 'grpo' has no teacher",
        "skills has no effect here: method 'grpo' uses no skills",
    ]


def test_a_key_is_noted_once() -> None:
    assert len(without_effect(config("method=grpo"), ["teacher.ema", "teacher.ema"])) == 1


def test_several_configurations_must_all_be_unaffected() -> None:
    grpo, imitation, skill_sd = (config(f"method={name}") for name in ("grpo", "grpo-imitation", "skill-sd"))
    assert without_effect_in_any([grpo, skill_sd], ["teacher.sync_every"]) == []
    assert without_effect_in_any([grpo, grpo, imitation], ["teacher.sync_every"]) == [
        "teacher.sync_every has no effect here: method 'grpo' has no teacher; method 'grpo-imitation' has no teacher"
    ]
    assert without_effect_in_any([], ["teacher.sync_every"]) == []
