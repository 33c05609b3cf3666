"""Keys that have no effect in a given configuration. The command line notes them when a user sets one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from skillsd.config.schema import RunConfig
from skillsd.methods import METHODS, Method

Rule = tuple[tuple[str, ...], Callable[[RunConfig, Method], str | None]]
"""Keys (or whole sections), and a function that returns why they have no effect, or None if they have one."""


def without_effect(config: RunConfig, keys: Iterable[str]) -> list[str]:
    """A note, with the reason, for each of the given keys that has no effect in `config`."""
    return without_effect_in_any([config], keys)


def without_effect_in_any(configs: Sequence[RunConfig], keys: Iterable[str]) -> list[str]:
    """A note for each of the given keys that has no effect in any of several configurations, with each reason once."""
    notes = []
    for key in dict.fromkeys(keys):
        reasons = [_reason(config, key) for config in configs]
        if reasons and all(reasons):
            notes.append(f"{key} has no effect here: {'; '.join(dict.fromkeys(map(str, reasons)))}")
    return notes


def _reason(config: RunConfig, key: str) -> str | None:
    """The first rule's reason why `key` has no effect, or None."""
    row = METHODS[config.method]
    for names, why in RULES:
        applies = any(key == name or key.startswith(f"{name}.") for name in names)
        if applies and (reason := why(config, row)):
            return reason
    return None


def _unless(condition: bool, reason: str) -> str | None:
    return None if condition else reason


def _no_teacher(config: RunConfig, row: Method) -> str | None:
    return _unless(row.teacher != "none", f"method {row.name!r} has no teacher")


def _not_synchronised(config: RunConfig, row: Method) -> str | None:
    return _unless(row.teacher == "synchronised", f"the teacher of method {row.name!r} is not synchronised")


def _no_skills(config: RunConfig, row: Method) -> str | None:
    return _unless(row.uses_skills, f"method {row.name!r} uses no skills")


def _fixed_lambda(config: RunConfig, row: Method) -> str | None:
    fixed = row.reward_weight == 0 and row.teacher != "none"
    return _unless(not fixed, f"method {row.name!r} is distillation only, with weight 1")


def _no_imitation(config: RunConfig, row: Method) -> str | None:
    return _unless(row.imitation_weight > 0, f"method {row.name!r} has no self-imitation")


def _not_measured(config: RunConfig, row: Method) -> str | None:
    read = row.teacher != "none" and row.context != "none"
    return _unless(read, f"method {row.name!r} has no teacher that reads a skill or reference solution")


def _not_measured_at_all(config: RunConfig, row: Method) -> str | None:
    return _not_measured(config, row) or _unless(config.measures_reading, "reading.every is 0")


def _no_readers(config: RunConfig, row: Method) -> str | None:
    return _unless(config.reading.share > 0, "reading.share is 0")


def _no_replay(config: RunConfig, row: Method) -> str | None:
    return _unless(config.reading.replay > 0, "reading.replay is 0")


def _no_ucb(config: RunConfig, row: Method) -> str | None:
    used = config.skills.pick in ("ucb", "ucb-prior") or ":" in config.skills.pick
    return _unless(used, f"skills.pick is {config.skills.pick!r}, not UCB")


def _no_uplift(config: RunConfig, row: Method) -> str | None:
    return _unless(config.skills.credit == "uplift", f"skills.credit is {config.skills.credit!r}, not 'uplift'")


def _no_endpoint(config: RunConfig, row: Method) -> str | None:
    chosen = config.skills.summariser
    return _unless(chosen == "openai", f"skills.summariser is {chosen!r}, not 'openai'")


def _no_language_model(config: RunConfig, row: Method) -> str | None:
    chosen = config.skills.summariser
    return _unless(chosen != "rules", "skills.summariser is 'rules', which uses no language model")


def _not_easy_first(config: RunConfig, row: Method) -> str | None:
    return _unless(config.curriculum.easy_first, "curriculum.easy_first is false")


RULES: tuple[Rule, ...] = (
    (
        ("teacher", "objective.normaliser", "objective.estimator", "objective.top_k", "objective.distil_clamp"),
        _no_teacher,
    ),
    (("objective.lambda_sdl", "objective.lambda_schedule"), _no_teacher),
    (("objective.lambda_sdl",), _fixed_lambda),
    (("teacher.sync_every", "teacher.ema", "teacher.min_reading"), _not_synchronised),
    (("reading.every",), _not_measured),
    (("reading.episodes",), _not_measured_at_all),
    (("reading.source",), _no_readers),
    (("reading.replay_weight",), _no_replay),
    (("objective.imitation_weight",), _no_imitation),
    (("skills", "summariser"), _no_skills),
    (("skills.ucb_c",), _no_ucb),
    (("skills.uplift_episodes",), _no_uplift),
    (
        (
            *("summariser.model", "summariser.base_url", "summariser.api_key_env", "summariser.request"),
            *("summariser.timeout_seconds", "summariser.max_retries", "summariser.requests_per_minute"),
            *("summariser.budget_calls", "summariser.budget_tokens", "summariser.price_in", "summariser.price_out"),
        ),
        _no_endpoint,
    ),
    (("summariser",), _no_language_model),
    (("curriculum.full_at",), _not_easy_first),
)
