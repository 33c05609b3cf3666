"""The command line. Mistakes get one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import Command, assert_one_line
from toy_run import toy_settings

from skillsd import config as configs
from skillsd.cli.app import main
from skillsd.errors import EngineFailedError
from skillsd.skills.bank import Bank
from skillsd.types import Outcome, Skill, Task


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four iterations, with its recipe next to it."""
    from skillsd.config import RunConfig, load
    from skillsd.runs.lifecycle import run_training

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli")
    settings = toy_settings(tiny_model, training={"iterations": 4}, rollout={"tasks_per_iteration": 7})
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    run_training(load(RunConfig, str(folder / "toy.yaml")), folder / "run")
    with Bank(folder / "run" / "skills.sqlite") as bank:
        # A language model may write anything, including rich's markup and emoji codes.
        bank.add(
            Task("train-0", "toy", "train"),
            Skill("", "[/INST] ends [bold]here :smile:", "x" * 300),
            source="iteration-1/train-0/0", iteration=1, reward=0.5, outcome=Outcome.FAILED,
        )  # fmt: skip
    return folder


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "'train'"),
        (["train"], "RECIPE"),
        (["train", "sokoban-nan"], "'sokoban-nano'"),
        (["train", "sokoban-nano", "--resum"], "--resume"),
        (["train", "sokoban-nano", "training.iteratons=1"], "'training.iterations'"),
        (["train", "sokoban-nano", "method=gpro"], "'grpo'"),
        (["train", "sokoban-nano", "training.iterations=x"], "training.iterations is 'x'"),
        (["train", "sokoban-nano", "iterations"], "key=value"),
        (["train", "sokoban-nano", "environment.name=sokobn"], "'sokoban'"),
        (["train", "sokoban-nano", "environment.name=no.such:Thing"], "can't be imported"),
        (["train", "sokoban-nano", "environment.options.presett=nano"], "preset"),
        (["train", "sokoban-nano", "environment.options.preset=nanoo"], "nano"),
        (["train", "sokoban-nano", "evaluation.split=tunee"], "'tune'"),
        (["train", "sokoban-nano", "evaluation.split=train"], "held-out"),
        (["train", "sokoban-nano", "rollout.tasks_per_iteration=1000"], "96 training tasks"),
        (["train", "sokoban-nano", "model.name=/no/model"], "/no/model"),
        (["train", "sokoban-nano", "model.device=gpu"], "gpu"),
        (["train", "sokoban-nano", "model.chat_template_kwargs={enable_thinkng: true}"], "'enable_thinkng'"),
        (["models", "fetch", "smollm-135m"], "'smollm2-135m'"),
        (["train", "sokoban-nano", "skills.template=teach"], "'teacher'"),
        (["train", "nano-base"], "skillsd sft"),
        (["train", "."], "is a folder"),
        (["sft", "sokoban-nano"], "skillsd train"),
        (["eval", "nowhere"], "--recipe"),
        (["eval", "--model", "nowhere", "--recipe", "sokoban-nano"], "nowhere"),
        (["eval"], "nothing to evaluate"),
        (["eval", "--model", "m", "--endpoint", "nonsense", "--recipe", "sokoban-nano"], "base_url"),
        (["eval", "--endpoint", "http://localhost:1/v1"], "--model"),
        (["eval", "--model", "nano", "--recipe", "sokoban-nano", "--price-in", "1"], "--endpoint"),
        (["eval", "--model", "nano", "--recipe", "sokoban-nano", "--json", "no/folder/x.json"], "no/folder"),
        (["eval", "--model", "nano", "--recipe", "sokoban-nano", "--limit", "0"], "--limit"),
        (["eval", "--model", "nano", "--recipe", "sokoban-nano", "--append"], "--json"),
        (["table", "sokoban-nano", "--methods", "gpro"], "'grpo'"),
        (["table", "sokoban-nano", "--methods", "grpo,,"], "commas"),
        (["table", "sokoban-nano", "--episodes", "many"], "--episodes is 'many'"),
        (["table", "sokoban-nano", "--methods", "grpo", "--episodes", "100"], "128 episodes per iteration"),
        (["doctor", "sokoban-nan"], "'sokoban-nano'"),
        (["skills", "lst"], "'list'"),
        (["skills", "list", "nowhere"], "no skill bank"),
        (["skills", "show", "nowhere", "one"], "skill"),
        (["envs", "play", "sokobn"], "'sokoban'"),
        (["envs", "play", "sokoban", "preset"], "option=value"),
        (["envs", "play", "sokoban", "preset={"], "YAML"),
    ],
)
def test_a_mistake_gets_one_helpful_line(skillsd: Command, arguments: list[str], expected: str) -> None:
    assert_one_line(skillsd(*arguments), expected)


def test_odd_paths(skillsd: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert_one_line(skillsd("train", "sokoban-nano", "--out", "file"), "is a file")
    assert_one_line(skillsd("train", "sokoban-nano", "--out", "file/run"), "file")
    (tmp_path / "latin.yaml").write_bytes("name: grün".encode("latin-1"))
    assert_one_line(skillsd("train", "latin.yaml"), "latin.yaml", "not readable")
    assert_one_line(skillsd("skills", "list", "file"), "not a skill bank")
    assert_one_line(skillsd("train", "x" * 5000), "xxx")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("the disk\nis odd"), "the disk is odd"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file", "x.txt"), "'x.txt': No such file"),
        (ConnectionError(), "ConnectionError"),
        (EngineFailedError("vLLM is gone"), "vLLM is gone"),
    ],
)
def test_a_system_error_gets_one_line(
    skillsd: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail() -> list[str]:
        raise error

    monkeypatch.setattr(configs, "recipes", fail)
    assert_one_line(skillsd("recipes"), expected)


def test_a_bug_keeps_its_traceback(skillsd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(configs, "recipes", fail)
    monkeypatch.setattr(sys, "argv", ["skillsd", "recipes"])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_a_model_is_exported_into_the_current_folder(skillsd: Command, run: Path, tmp_path: Path) -> None:
    result = skillsd("export", run / "run", "--out", ".")
    assert result.code == 0, result
    assert Path("config.json").is_file()  # still the same folder
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.parent.glob(".*.partial"))
    assert_one_line(skillsd("export", run / "run", "--out", "."), "is not empty")


def test_wandb_missing(skillsd: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_one_line(skillsd("train", run / "toy.yaml", "log.wandb=x", "--out", "other"), "pip install wandb")


def test_an_existing_run(skillsd: Command, run: Path) -> None:
    assert_one_line(skillsd("train", run / "toy.yaml", "--out", run / "run"), "--resume")
    changed = skillsd("train", run / "toy.yaml", "seed=1", "--out", run / "run", "--resume")
    assert_one_line(changed, "seed was 0, now 1")
    assert skillsd("train", run / "toy.yaml", "--out", run / "run", "--resume").code == 0


@pytest.mark.parametrize("arguments", [[], ["skills"], ["envs"]])
def test_no_command_prints_help(skillsd: Command, arguments: list[str]) -> None:
    result = skillsd(*arguments)
    assert result.code == 2
    assert "Usage: skillsd" in result.out + result.err


# -- what works -----------------------------------------------------------------------------------------------------


def test_training_shows_progress(skillsd: Command, run: Path, tmp_path: Path) -> None:
    # A folder whose name looks like rich markup.
    result = skillsd("train", run / "toy.yaml", "training.iterations=1", "--out", "[bold]run[/]")
    assert result.code == 0, result
    assert result.err == ""
    assert "training: 1/1 train accuracy " in result.out
    assert ", no skill yet, " in result.out
    assert "after 28 episodes: accuracy" in result.out
    *_, work, gain, warning, places, report, done, empty = result.out.split("\n")
    assert work.startswith("28 episodes in 1 iterations, ")
    assert " skills from 28 trajectories" in work
    assert work.endswith("; 0 of 7 groups with a teacher")
    assert gain.startswith("accuracy [95 % over tasks] on 4 tune tasks: before ")
    assert ", after 28 episodes " in gain
    assert warning.startswith("warning: no group had a teacher in 1 iterations, so the run is plain GRPO")
    assert places.startswith("in [bold]run[/]/: metrics.jsonl")
    assert report.startswith("report: [bold]run[/]/report.html")
    assert done.startswith("done: [bold]run[/]/")
    assert empty == ""
    assert (tmp_path / "[bold]run[/]" / "checkpoints" / "step-1").is_dir()


def test_a_run_of_zero_iterations(skillsd: Command, run: Path) -> None:
    assert skillsd("train", run / "toy.yaml", "training.iterations=0", "--out", "none").code == 0


def test_a_run_and_a_model_are_evaluated(skillsd: Command, run: Path, tmp_path: Path, tiny_model: Path) -> None:
    rows = (run / "run" / "skills.sqlite").read_bytes()
    result = skillsd("eval", run / "run", "--split", "tune", "--samples", 2, "--json", "figures.json")
    assert result.code == 0, result
    sampled, greedy = json.loads((tmp_path / "figures.json").read_text())
    assert (sampled["temperature"], sampled["episodes"], greedy["temperature"], greedy["episodes"]) == (1.0, 8, 0.0, 4)
    assert sampled["split"] == greedy["split"] == "tune"
    # No number is truncated.
    assert f"{100 * sampled['accuracy']:.1f} %" in result.out
    assert "…" not in result.out
    assert (run / "run" / "skills.sqlite").read_bytes() == rows
    result = skillsd("eval", "--model", tiny_model, "--recipe", run / "toy.yaml", "--limit", 1)
    assert result.code == 0, result
    assert len(sampled["successes"]) == 4
    assert sum(sampled["successes"]) / 4 == pytest.approx(sampled["accuracy"])
    assert sum(greedy["rewards"]) / 4 == pytest.approx(greedy["completion"])
    assert (sampled["samples"], greedy["samples"], sampled["iteration"]) == (2, 1, 4)
    assert_one_line(skillsd("eval", run / "run", "--split", "tst"), "'test'")
    assert_one_line(skillsd("eval", run / "run", "--recipe", "sokoban-nano"), "a run has its own recipe")


def test_several_checkpoints_of_a_run_are_evaluated(skillsd: Command, run: Path, tmp_path: Path) -> None:
    result = skillsd("eval", run / "run", "--split", "tune", "--at", 4, "--at", 2, "--json", "figures.json")
    assert result.code == 0, result
    records = json.loads((tmp_path / "figures.json").read_text())
    assert [(r["iteration"], r["temperature"]) for r in records] == [(4, 1.0), (4, 0.0), (2, 1.0), (2, 0.0)]
    manifest = json.loads((run / "run" / "manifest.json").read_text())
    assert {r["model"]["weights"] for r in records} == {manifest["model"]["weights"]}
    assert {r["run"] for r in records} == {manifest["started"]}
    # The default is the last one.
    assert skillsd("eval", run / "run", "--split", "tune", "--json", "last.json").code == 0
    last = json.loads((tmp_path / "last.json").read_text())
    assert [r["successes"] for r in last] == [r["successes"] for r in records[:2]]
    assert_one_line(skillsd("eval", run / "run", "--at", 3), "no checkpoint of iteration 3; it has: 2, 4")
    assert_one_line(
        skillsd("eval", "--model", "nano", "--recipe", run / "toy.yaml", "--at", 3), "--at is for a run's checkpoints"
    )


def test_skills_are_listed_shown_and_exported(skillsd: Command, run: Path, tmp_path: Path) -> None:
    with Bank(run / "run" / "skills.sqlite") as bank:
        stored = bank.skills()
    assert stored
    result = skillsd("skills", "list", run / "run", "--limit", 9999)
    assert result.code == 0, result
    assert f"{len(stored)} skills" in result.out
    assert result.out.count("train-") == len(stored)
    odd = stored[-1]
    shown = skillsd("skills", "show", run / "run", odd.id)
    assert json.loads(shown.out)["skill"]["mistake_analysis"] == odd.skill.mistake_analysis  # verbatim
    prompt = skillsd("skills", "show", run / "run", odd.id, "--prompt").out
    assert prompt.startswith("[user]\n")
    assert "Sokoban: #" in prompt
    assert odd.skill.golden_workflow in prompt or odd.skill.mistake_analysis in prompt
    exported = [json.loads(line) for line in skillsd("skills", "export", run / "run").out.splitlines()]
    assert [record["id"] for record in exported] == [skill.id for skill in stored]
    assert exported[0]["source"] == stored[0].source
    assert skillsd("skills", "export", run / "run", "all.jsonl").code == 0
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == len(stored)
    only = skillsd("skills", "list", run / "run" / "skills.sqlite", "--task", "train-0")
    assert "train-1" not in only.out
    assert_one_line(skillsd("skills", "list", run / "run", "--task", "train-99"), "train-99")
    assert_one_line(skillsd("skills", "show", run / "run", 99999), "no skill 99999")
    assert_one_line(skillsd("skills", "export", run / "run", "no/folder/x.jsonl"), "no/folder")


def test_listings(skillsd: Command) -> None:
    trained, _, warmed = skillsd("recipes").out.partition("for `skillsd sft`:")
    assert "sokoban-nano" in trained
    assert "nano-base " in warmed
    assert "nano-base " not in trained
    assert all(line.rstrip()[-1] not in ",:(" for line in trained.splitlines()[1:])
    states = dict(line.split(maxsplit=1) for line in skillsd("envs", "list").out.splitlines())
    assert states["sokoban"].startswith("ready       train 96, ")
    assert states["openenv"].startswith("not ready   openenv needs environment.options.url")
    assert "openenv-demo" in states
    packages = [line.split()[0] for line in skillsd("doctor").out.splitlines() if line]
    assert "torch" in packages
    assert packages.count("peft") == 1
    assert skillsd("version").out.strip().count(".") == 2
    assert skillsd("--help").code == 0


def test_the_doctor_estimates_a_recipe(skillsd: Command, run: Path) -> None:
    result = skillsd("doctor", run / "toy.yaml")
    assert result.code == 0, result
    assert "fits" in result.out
    result = skillsd("doctor", run / "toy.yaml", "model.name=/no/model")
    assert result.code == 2
    no_model = (
        "expected a folder with config.json, weights and a tokenizer{}. Models by name: nano, rulebook-nano, "
        "smollm2-135m\n"
    )
    assert result.err == f"error: no model in '/no/model': {no_model.format('')}"
    result = skillsd("doctor", run / "toy.yaml", "model.name=models/mine")  # without asking the hub
    assert result.err == f"error: no model in 'models/mine': {no_model.format(', as `skillsd sft mine` makes it')}"


def test_a_mistake_imports_nothing_heavy() -> None:
    """In a separate process, which also shows the real exit code."""
    script = "import sys; sys.argv = ['skillsd', 'trian']\nfrom skillsd.cli.app import main\ntry: main()\nfinally: "
    script += "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: No such command 'trian'. Did you mean 'train'? (skillsd --help)\n"


def test_models_with_a_short_name(skillsd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    result = skillsd("models", "list")
    assert (result.code, result.err) == (0, "")
    nano, rulebook, smollm2 = result.out.splitlines()
    assert rulebook.startswith("rulebook-nano ")
    assert nano.startswith("nano ")
    assert smollm2.startswith("smollm2-135m ")
    assert smollm2.endswith("not fetched yet")
    result = skillsd("models", "fetch", "nano")
    assert (Path(result.out.strip()) / "config.json").is_file()
