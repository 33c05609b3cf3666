"""`skillsd config`, notes on settings without effect, and hints for options that are settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command import Command, assert_one_line
from toy_run import toy_settings

from skillsd import config as configs

# -- skillsd config -------------------------------------------------------------------------------------------------


def test_the_whole_reference(skillsd: Command) -> None:
    shown = skillsd("config")
    assert (shown.code, shown.err) == (0, "")
    for section in ("top level: ", "training: ", "model.lora: ", "skills: ", "engine: The embedded engine"):
        assert f"\n{section}" in f"\n{shown.out}"
    assert "  training.learning_rate = 1e-06   (number)\n      " in shown.out
    assert "  name = (required)   (text)\n" in shown.out


@pytest.mark.parametrize("key", ["skills.pick", "pick"])
def test_a_key(skillsd: Command, key: str) -> None:
    shown = skillsd("config", key)
    assert shown.code == 0
    assert shown.out.count(" = ") == 1
    assert "  skills.pick = ucb   (text)\n      How one of a task's skills is selected: `ucb`" in shown.out


def test_a_section(skillsd: Command) -> None:
    lines = skillsd("config", "training").out.splitlines()
    assert lines[0].startswith("training: ")
    assert all(line.startswith(("  training.", "      ")) for line in lines[1:])


def test_an_engines_options(skillsd: Command) -> None:
    assert "engine.max_model_len" in skillsd("config", "engine", "--engine", "vllm").out
    assert "engine.max_model_len" not in skillsd("config", "engine").out
    assert_one_line(skillsd("config", "--engine", "vlm"), "unknown engine 'vlm'. Did you mean 'vllm'?")


def test_warm_start_recipes(skillsd: Command) -> None:
    shown = skillsd("config", "--sft").out
    assert "warm_start.steps" in shown
    assert "skills.pick" not in shown


def test_a_misspelt_key(skillsd: Command) -> None:
    assert_one_line(skillsd("config", "skills.pik"), "no section or key 'skills.pik'. Did you mean 'skills.pick'?")


@pytest.mark.parametrize(("options", "key"), [([], "skills"), (["--sft"], "warm_start")])
def test_the_schema(skillsd: Command, options: list[str], key: str) -> None:
    shown = skillsd("config", "--schema", *options)
    assert shown.code == 0
    assert key in json.loads(shown.out)["properties"]


# -- settings without effect ----------------------------------------------------------------------------------------


@pytest.fixture
def toy(tiny_model: Path, tmp_path: Path) -> Path:
    settings = toy_settings(tiny_model, training={"iterations": 1}, evaluation={"every": 0, "limit": 1})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "toy.yaml"


NOTE = "note: teacher.sync_every has no effect here: method 'grpo' has no teacher"


def test_train_notes_settings_without_effect(skillsd: Command, toy: Path) -> None:
    shown = skillsd("train", toy, "teacher.sync_every=2", "method=grpo", "--out", "grpo")
    assert shown.code == 0, shown
    assert shown.out.splitlines()[0] == NOTE
    shown = skillsd("train", toy, "teacher.sync_every=2", "method=skill-sd", "--out", "skill-sd")
    assert shown.code == 0, shown
    assert "no effect" not in shown.out


def test_a_recipes_own_settings_are_not_noted(skillsd: Command, toy: Path) -> None:
    """Recipes serve several methods, so most of them have settings that one of those ignores."""
    shown = skillsd("train", toy, "method=grpo", "--out", "grpo")
    assert shown.code == 0, shown
    assert "no effect" not in shown.out


def test_table_notes_settings_without_effect_in_all_of_its_methods(skillsd: Command, toy: Path) -> None:
    shown = skillsd("table", toy, "teacher.sync_every=2", "--methods", "grpo", "--seeds", 2, "--dry-run")
    assert shown.code == 0, shown
    assert shown.out.splitlines()[0] == NOTE
    assert shown.out.count("no effect") == 1
    shown = skillsd("table", toy, "teacher.sync_every=2", "--methods", "grpo,skill-sd", "--dry-run")
    assert shown.code == 0, shown
    assert "no effect" not in shown.out


def test_a_variants_method_counts(skillsd: Command, toy: Path) -> None:
    (toy.parent / "v.yaml").write_text("mine: {method: skill-sd}")
    options = ["--variants", "v.yaml", "--methods", "grpo,mine", "--dry-run"]
    assert "no effect" not in skillsd("table", toy, "teacher.sync_every=2", *options).out


# -- options that are settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "sokoban-nano", "--method", "grpo"], "Did you mean method=grpo?"),
        (["train", "sokoban-nano", "--method=grpo"], "Did you mean method=grpo?"),
        (["train", "sokoban-nano", "--method"], "Did you mean method=VALUE?"),
        (["train", "sokoban-nano", "--seed", "3", "--out", "x"], "Did you mean seed=3?"),
        (["train", "sokoban-nano", "--learning-rate", "1e-4"], "Did you mean training.learning_rate=1e-4?"),
        (["train", "sokoban-nano", "--training.iterations", "3"], "Did you mean training.iterations=3?"),
        (["train", "sokoban-nano", "--model", "nano"], "Did you mean model.name=nano?"),
        (["train", "sokoban-nano", "--greedy", "--resume"], "Did you mean evaluation.greedy=VALUE?"),
        (
            ["train", "sokoban-nano", "--concurrency", "4"],
            "Did you mean rollout.concurrency=4 or skills.concurrency=4?",
        ),
        (["demo", "--iterations", "3"], "Did you mean training.iterations=3?"),
        (["doctor", "sokoban-nano", "--device", "cpu"], "Did you mean model.device=cpu?"),
        (["sft", "nano-base", "--steps", "3"], "Did you mean warm_start.steps=3?"),
        (["eval", "--recipe", "sokoban-nano", "--turn-tokens", "3"], "Did you mean rollout.turn_tokens=3?"),
        (["table", "sokoban-nano", "--lambda-sdl", "3"], "Did you mean objective.lambda_sdl=3?"),
    ],
)
def test_an_option_that_is_a_setting_gets_a_hint(skillsd: Command, arguments: list[str], hint: str) -> None:
    assert_one_line(skillsd(*arguments), "No such option", hint, "--help)")


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["table", "sokoban-nano", "--method", "grpo"], "--methods"),
        (["train", "sokoban-nano", "--resum"], "--resume"),
        (["train", "sokoban-nano", "--no-such-key", "3"], "No such option: --no-such-key (skillsd"),
        (["skills", "list", "x", "--seed", "3"], "No such option: --seed (skillsd"),
    ],
)
def test_other_unknown_options_get_none(skillsd: Command, arguments: list[str], suggestion: str) -> None:
    result = skillsd(*arguments)
    assert_one_line(result, suggestion)
    assert "=" not in result.err


# -- listings -------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_by_command_with_a_whole_sentence(skillsd: Command) -> None:
    train, sft = skillsd("recipes").out.removeprefix("for `skillsd train`:\n").split("for `skillsd sft`:\n")
    listed = {
        name: text for part in (train, sft) for name, text in (line.split(maxsplit=1) for line in part.splitlines())
    }
    assert sorted(listed) == configs.recipes()
    assert "sokoban-nano " in train
    assert "nano-base " in sft
    for name, text in listed.items():
        lines = (configs.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        assert comment.startswith(f"{text}."), name


def test_the_doctor_lists_each_package_once(skillsd: Command) -> None:
    first_words = [line.split()[0] for line in skillsd("doctor").out.splitlines()]
    for package in ("python", "torch", "peft", "openai"):
        assert first_words.count(package) == 1


@pytest.mark.parametrize(
    "command",
    [
        *(["train"], ["sft"], ["export"], ["eval"], ["demo"], ["table"], ["config"], ["methods"], ["recipes"]),
        *(["doctor"], ["version"], ["skills"], ["models"], ["envs"], ["skills", "gap"], ["envs", "setup"], []),
    ],
)
def test_no_help_text_is_cut(skillsd: Command, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = skillsd(*command, "--help")
    assert shown.code == 0
    assert "... " not in shown.out.replace("]...", "")
    assert not any(line.endswith("...") for line in shown.out.replace("]...", "").splitlines())
