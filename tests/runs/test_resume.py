"""Resuming with damaged or lost checkpoints, and the notes of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lifecycle import assert_same_run, changed, records
from toy_run import toy_settings

from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.runs import lifecycle
from skillsd.runs.api import train
from skillsd.runs.export import export
from skillsd.runs.lifecycle import run_training
from skillsd.runs.subjects import load_trained
from skillsd.runs.sync import run_blocking
from skillsd.training.health import Finding


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> RunConfig:
    return RunConfig.model_validate(toy_settings(tiny_model))


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations with checkpoints at 4 and 6."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_training(config, folder)
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(config: RunConfig, folder: Path) -> list[str]:
    notes: list[str] = []
    assert run_training(config, folder, resume=True, on_note=notes.append)
    return notes


def cut(file: str) -> Callable[[Path], object]:
    return lambda step: (step / file).write_bytes((step / file).read_bytes()[:1000])


def edited(**values: Any) -> Callable[[Path], object]:
    def edit(step: Path) -> None:
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps({**state, **values}))

    return edit


DAMAGES = {
    "weights cut": cut("engine.pt"),
    "weights gone": lambda step: (step / "engine.pt").unlink(),
    "bank cut": cut("skills.sqlite"),
    "bank gone": lambda step: (step / "skills.sqlite").unlink(),
    "state cut": lambda step: (step / "state.json").write_text('{"iteration"'),
    "state gone": lambda step: (step / "state.json").unlink(),
    "visits": edited(visits=3),
    "totals": edited(totals=None),
    "iteration": edited(iteration="six"),
    "empty folder": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_replaced_by_the_one_before(
    config: RunConfig, finished: Path, tmp_path: Path, damage: str
) -> None:
    folder = copied(finished, tmp_path)
    DAMAGES[damage](folder / "checkpoints" / "step-6")
    notes = resume(config, folder)
    assert f"It is kept as {folder}/checkpoints/step-6.damaged; step-4 is there and is used instead" in notes[0]
    assert notes[1] == f"resuming from {folder}/checkpoints/step-4: iteration 5 of 6 is next"
    assert_same_run(folder, finished)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-4", "step-6", "step-6.damaged"]
    DAMAGES[damage](folder / "checkpoints" / "step-6")  # a second time
    resume(config, folder)
    assert (folder / "checkpoints" / "step-6.damaged-2").is_dir()


def test_if_every_checkpoint_is_damaged_all_are_named_and_none_is_touched(
    config: RunConfig, finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path)
    for name in ("step-4", "step-6"):
        cut("engine.pt")(folder / "checkpoints" / name)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"step-6.*is damaged.*Nor can step-4 be read"):
        run_training(config, folder, resume=True)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("load", ["evaluate", "export"])
def test_reading_a_damaged_checkpoint_names_the_others(finished: Path, tmp_path: Path, load: str) -> None:
    folder = copied(finished, tmp_path)
    cut("engine.pt")(folder / "checkpoints" / "step-6")
    with pytest.raises(UserError, match=r"is damaged .*other checkpoints with --at: 4$"):
        run_blocking(load_trained(folder)) if load == "evaluate" else export(folder, tmp_path / "out")


def test_a_resumed_run_notes_where_it_goes_on(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    assert resume(config, folder) == [f"resuming from {folder}/checkpoints/step-6: all is done"]
    longer = changed(config, training={"iterations": 7})
    assert f"resuming from {folder}/checkpoints/step-6: iteration 7 of 7 is next" in resume(longer, folder)


def test_lost_checkpoints_are_an_error_and_nothing_is_overwritten(
    config: RunConfig, finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"metrics of 6 iterations, but its checkpoints are gone: .* put .*checkpoints"):
        run_training(config, folder, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_run_that_ended_before_its_first_checkpoint_keeps_its_files_aside(config: RunConfig, tmp_path: Path) -> None:
    rare, folder = changed(config, training={"iterations": 2}, checkpoint={"every": 2}), tmp_path / "run"
    assert run_training(rare, folder)
    for again in ("before-restart", "before-restart-2"):
        shutil.rmtree(folder / "checkpoints")
        before = (folder / "metrics.jsonl").read_bytes()
        notes = resume(rare, folder)
        assert notes[0] == (
            f"{folder} has no checkpoint yet, so the run starts again; its first 2 iterations are kept in "
            f"{folder}/{again}"
        )
        assert (folder / again / "metrics.jsonl").read_bytes() == before
        assert (folder / again / "skills.sqlite").is_file()
        assert [record["iteration"] for record in records(folder)] == [1, 2]


def test_a_state_without_learning_is_noted_once_while_the_run_goes_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def found(made: Any, config: RunConfig) -> list[Finding]:
        seen.append([record["iteration"] for record in made])
        return [Finding("stuck", "nothing is learnt", "Change it")] if len(made) > 1 else []

    monkeypatch.setattr(lifecycle, "health", found)
    notes: list[str] = []
    folder, short = tmp_path / "run", changed(config, training={"iterations": 4})
    run_training(short, folder, on_note=notes.append)
    assert notes == ["nothing is learnt. Change it"]
    assert seen == [[1], [1, 2], [1, 2, 3]]  # what holds at the end is in the closing lines
    seen.clear()
    resume(changed(config, training={"iterations": 6}), folder)
    assert seen == [[1, 2, 3, 4, 5]]  # with those before the stop


def test_a_run_that_is_too_short_for_skills_is_noted_before_it_starts(config: RunConfig, tmp_path: Path) -> None:
    notes: list[str] = []
    run = train(changed(config, training={"iterations": 1}), out=tmp_path / "run", on_note=notes.append)
    assert notes[0].startswith("no task will come twice (1 iterations of 3 of 7 tasks), so no skill will be used. ")
    closing = notes[1:]
    assert closing[0].startswith("12 episodes in 1 iterations, ")
    assert any(
        line.startswith("warning: no group had a teacher in 1 iterations, so the run is plain GRPO") for line in closing
    )
    assert closing[-1].startswith(f"in {run.folder}/: metrics.jsonl")
