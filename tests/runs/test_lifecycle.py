"""A run's folder: start, interrupt, kill, resume."""

from __future__ import annotations

import asyncio
import builtins
import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toy_run import toy_settings, without_clocks

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.engines.torch.engine import TorchEngine
from skillsd.errors import EngineFailedError, UserError
from skillsd.report.writer import EVALUATIONS, METRICS, read
from skillsd.runs.lifecycle import run_training
from skillsd.runs.subjects import load_trained
from skillsd.skills.bank import Bank
from skillsd.training import checkpoint

TESTS = Path(__file__).parents[1]


@pytest.fixture
def config(tiny_model: Path) -> RunConfig:
    return RunConfig.model_validate(toy_settings(tiny_model))


def changed(config: RunConfig, **sections: Mapping[str, Any] | str | int) -> RunConfig:
    data = config.model_dump()
    for name, value in sections.items():
        data[name] = {**data[name], **value} if isinstance(value, Mapping) else value
    return RunConfig.model_validate(data)


def records(folder: Path, file: str = METRICS) -> list[dict[str, Any]]:
    return without_clocks(read(folder / file))


def assert_same_run(folder: Path, expected: Path) -> None:
    """The folders are equal, except for metrics of the clock."""
    for file in (METRICS, EVALUATIONS):
        assert records(folder, file) == records(expected, file)
    with Bank(folder / "skills.sqlite") as bank, Bank(expected / "skills.sqlite") as other:
        assert bank.skills() == other.skills()
    paths = [checkpoint.find(run) / "engine.pt" for run in (folder, expected)]
    left, right = (torch.load(path)["weights"] for path in paths)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    names = [sorted(path.name for path in (f / "trajectories").iterdir()) for f in (folder, expected)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folder / "trajectories" / name).read_bytes() == (expected / "trajectories" / name).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run_training(RunConfig.model_validate(toy_settings(tiny_model)), folder)
    return folder


def skillsd_process(script: list[str], **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, *script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# -- a run's folder -------------------------------------------------------------------------------------------------


def test_files_of_a_run(uninterrupted: Path, config: RunConfig) -> None:
    assert configs.load(RunConfig, str(uninterrupted / "config.yaml")) == config
    assert [r["iteration"] for r in records(uninterrupted)] == [1, 2, 3, 4, 5, 6]
    assert [r["iteration"] for r in records(uninterrupted, EVALUATIONS)] == [0, 2, 4, 6]
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert set(manifest["panels"]) == {"train", "tune", "test"}
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["step-4", "step-6"]
    lines = gzip.decompress((uninterrupted / "trajectories" / "iteration-00001.jsonl.gz").read_bytes()).splitlines()
    assert len(lines) == 3
    assert len(list((uninterrupted / "trajectories").iterdir())) == 6


def test_existing_run_is_not_overwritten(uninterrupted: Path, config: RunConfig) -> None:
    before = (uninterrupted / METRICS).read_bytes()
    with pytest.raises(UserError, match="--resume"):
        run_training(config, uninterrupted)
    assert (uninterrupted / METRICS).read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path, config: RunConfig) -> None:
    before = (uninterrupted / METRICS).read_text(), (uninterrupted / EVALUATIONS).read_text()
    assert run_training(config, uninterrupted, resume=True)
    assert before == ((uninterrupted / METRICS).read_text(), (uninterrupted / EVALUATIONS).read_text())


def test_resume_names_settings_that_differ(uninterrupted: Path, config: RunConfig) -> None:
    other = changed(config, training={"learning_rate": 0.5}, method="grpo")
    with pytest.raises(UserError) as error:
        run_training(other, uninterrupted, resume=True)
    assert "method was 'skill-sd', now 'grpo'; training.learning_rate was 0.003, now 0.5" in str(error.value)
    assert "\n" not in str(error.value)


def test_run_can_be_extended(config: RunConfig, tmp_path: Path) -> None:
    assert run_training(changed(config, training={"iterations": 2}), tmp_path / "run")
    assert run_training(changed(config, training={"iterations": 3}), tmp_path / "run", resume=True)
    assert [r["iteration"] for r in records(tmp_path / "run")] == [1, 2, 3]
    assert [r["iteration"] for r in records(tmp_path / "run", EVALUATIONS)] == [0, 2, 3]
    assert configs.load(RunConfig, str(tmp_path / "run" / "config.yaml")).training.iterations == 3


def test_resume_with_other_tasks_is_refused(config: RunConfig, tmp_path: Path) -> None:
    short = changed(config, training={"iterations": 1})
    run_training(short, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["panels"]["tune"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the tasks of tune have changed"):
        run_training(short, tmp_path / "run", resume=True)


def test_resume_with_another_base_model_is_refused(config: RunConfig, tmp_path: Path) -> None:
    """The name is the same, but its files are not."""
    folder = shutil.copytree(config.model.name, tmp_path / "model")
    short = changed(config, model={"name": str(folder)}, training={"iterations": 1})
    run_training(short, tmp_path / "run")
    assert run_training(short, tmp_path / "run", resume=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "extra": 1}))
    with pytest.raises(UserError, match=r"the files of the model .* have changed since"):
        run_training(short, tmp_path / "run", resume=True)


def test_resume_with_another_template_is_refused(config: RunConfig, tmp_path: Path) -> None:
    """The path is the same, but the text is not."""
    template = tmp_path / "mine.txt"
    template.write_text("Plan: {golden_workflow}")
    short = changed(config, skills={"template": str(template)}, training={"iterations": 1})
    run_training(short, tmp_path / "run")
    assert run_training(short, tmp_path / "run", resume=True)
    template.write_text("The plan: {golden_workflow}")
    with pytest.raises(UserError, match=r"the text behind skills\.template has changed"):
        run_training(short, tmp_path / "run", resume=True)


def test_an_adapter_is_not_evaluated_on_another_base_model(config: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(config.model.name, tmp_path / "model")
    for lora in ({"rank": 2}, None):
        run = tmp_path / f"run-{lora}"
        short = changed(config, model={"name": str(folder), "lora": lora}, training={"iterations": 1})
        run_training(short, run)
        asyncio.run(load_trained(run))[0].close()
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: value + 0.01 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        if lora:
            with pytest.raises(UserError, match="are adapters, and the files of the model"):
                asyncio.run(load_trained(run))
        else:  # its checkpoints hold all weights
            asyncio.run(load_trained(run))[0].close()


def test_folders_with_other_files_are_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    for resume in (False, True):
        with pytest.raises(UserError, match="files that are not a run's"):
            run_training(config, tmp_path, resume=resume)
    with pytest.raises(UserError, match="is a file"):
        run_training(config, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "broken",
    [
        {"model": {"name": "/no/such/model"}},
        {"environment": {"options": {"colour": "blue"}}},
        {"rollout": {"trajectory_tokens": 9999}},
        {"objective": {"estimator": "reverse_kl", "top_k": 10**6}},
        {"log": {"wandb": "project"}},
    ],
)
def test_failed_start_leaves_no_folder(
    config: RunConfig, tmp_path: Path, broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError):
        run_training(changed(config, **broken), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert run_training(changed(config, training={"iterations": 0}), tmp_path / "run")


# -- a folder that another process uses, or whose run has not begun --------------------------------------------------


def test_resume_beside_a_living_run_is_refused_at_once(tiny_model: Path, tmp_path: Path) -> None:
    slow = toy_settings(tiny_model, environment={"options": {"delay": 0.2}}, training={"iterations": 50})
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(slow))
    process = skillsd_process(["-m", "skillsd", "train", str(recipe), "--out", str(folder)])
    try:
        deadline = time.monotonic() + 120
        while not records(folder) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        before = (folder / METRICS).read_bytes()
        for resume in (True, False):
            with pytest.raises(UserError, match=rf"process {process.pid} on .* is using the run '{folder}'"):
                run_training(RunConfig.model_validate(slow), folder, resume=resume)
        assert (folder / METRICS).read_bytes().startswith(before)
    finally:
        process.kill()
        process.wait()
    assert (folder / ".lock").exists()  # of the killed process; it holds nothing any more
    short = changed(RunConfig.model_validate(slow), training={"iterations": 1}, environment={"options": {}})
    with pytest.raises(UserError, match="holds a run already"):
        run_training(short, folder)


RAISING = """
from toy_env import Toy

class Broken(Toy):
    def make(self):
        environment = super().make()
        async def reset(task, seed):
            raise ValueError("the level is missing")
        environment.reset = reset
        return environment
"""


def test_a_run_that_never_finished_an_iteration_does_not_block_the_corrected_command(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_toy.py").write_text(RAISING)
    folder, seen, notes = tmp_path / "run", [], []
    wrong = changed(config, environment={"name": "broken_toy:Broken"})
    with pytest.raises(UserError, match="every episode of the evaluation on 'tune' failed") as error:
        run_training(wrong, folder, on_record=lambda kind, record: seen.append(kind), on_note=notes.append)
    assert seen == []  # no "accuracy nan % on 0 tasks"
    assert "ValueError: the level is missing" in str(error.value)
    assert "broken_toy.py:8" in str(error.value)
    assert any("errors.log" in note for note in notes)
    full = (folder / "errors.log").read_text()
    assert "Traceback" in full
    assert 'raise ValueError("the level is missing")' in full

    short = changed(config, training={"iterations": 1})
    for resume in (False, True):
        assert (folder / "config.yaml").exists()
        assert run_training(short, folder, resume=resume, on_note=notes.append)
        assert sorted(path.name for path in folder.iterdir()) == [
            *("checkpoints", "config.yaml", "evaluations.jsonl", "manifest.json", "metrics.jsonl", "skills.sqlite"),
            "trajectories",
        ]
        if not resume:
            assert any(note.endswith("had not finished an iteration: it starts anew") for note in notes)
            shutil.rmtree(folder)
            with pytest.raises(UserError):
                run_training(wrong, folder)


def test_a_constructor_that_raises_leaves_its_traceback_and_blocks_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_set.py").write_text("def build():\n    return {}['x']\n")
    with pytest.raises(UserError, match=r"broken_set\.py:2"):
        run_training(changed(config, environment={"name": "broken_set:build"}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["errors.log"]
    assert "KeyError: 'x'" in (tmp_path / "run" / "errors.log").read_text()
    assert run_training(changed(config, training={"iterations": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "errors.log").exists()


# -- a full disk -----------------------------------------------------------------------------------------------------


def fail_writes(patch: pytest.MonkeyPatch, part: str, after: int = 0) -> None:
    """From the given time on, opening a file whose path contains `part` for writing fails as on a full disk."""
    real, seen = builtins.open, 0

    def full(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        nonlocal seen
        if part in str(file) and set(mode) & set("wax+"):
            seen += 1
            if seen > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real(file, mode, *args, **more)

    patch.setattr(builtins, "open", full)
    patch.setattr(io, "open", full)


@pytest.mark.parametrize(
    ("part", "after"),
    [
        ("metrics.jsonl", 0),
        ("metrics.jsonl", 3),
        ("evaluations.jsonl", 2),
        ("iteration-00004", 0),
        ("state.json", 1),
        ("tokenizer_config.json", 1),
        ("model.safetensors", 1),
        ("engine.pt", 1),
        ("skills.sqlite.partial", 1),
    ],
)
def test_a_full_disk_is_one_line_and_resume_continues(
    part: str, after: int, config: RunConfig, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_writes(patch, part, after)
        if part in ("model.safetensors", "engine.pt"):
            name = "save_weights" if part == "model.safetensors" else "save_state"
            patch.setattr(TorchEngine, name, failing(getattr(TorchEngine, name), after))
        with pytest.raises(UserError, match=r"No space left|iostream error|No such file") as error:
            run_training(config, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert "make room there, then resume with --resume" in str(error.value)
    assert not list(folder.rglob("*.partial"))
    for found in checkpoint.iterations(folder):
        asyncio.run(load_trained(folder, found))[0].close()
    assert run_training(config, folder, resume=True)
    assert_same_run(folder, uninterrupted)


def failing(method: Any, after: int) -> Any:
    """A save that fails half-way, with a library's own exception."""
    calls = 0

    def save(self: Any, folder: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            folder.mkdir(exist_ok=True)
            (folder / "half").write_bytes(b"0" * 100)
            raise RuntimeError("basic_ios::clear: iostream error")
        return method(self, folder)

    return save


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_other_files_in_the_checkpoints_folder_are_kept(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    run_training(changed(config, training={"iterations": 1}, checkpoint={"every": 1, "keep": 1}), tmp_path / "run")
    (folder / "step-1").rename(folder / "step-1-good")
    (folder / "step-99.txt").write_text("a note")
    (folder / ".step-7.partial").mkdir()  # of a process that was killed
    longer = changed(config, training={"iterations": 3}, checkpoint={"every": 1, "keep": 1})
    run_training(longer, tmp_path / "run", resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["step-1-good", "step-3", "step-99.txt"]


def test_newest_checkpoint_is_the_highest_number(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-11-copy", ".step-12.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-10"
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_checkpoint_of_another_version_is_refused(config: RunConfig, tmp_path: Path) -> None:
    short = changed(config, training={"iterations": 1})
    run_training(short, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-1" / "state.json").write_text('{"iteration": 1}')
    with pytest.raises(UserError, match=r"state.json lacks ahead, best_successes, pending_summaries"):
        run_training(short, tmp_path / "run", resume=True)


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from skillsd.config import RunConfig, load
from skillsd.engines.torch.engine import TorchEngine
from skillsd.runs.lifecycle import run_training
from skillsd.runs.subjects import load_trained

save, saves = TorchEngine.save_state, 0

async def half(self, folder):
    global saves
    saves += 1
    if saves == 2:
        await save(self, folder)
        (folder / "engine.pt").write_bytes((folder / "engine.pt").read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    await save(self, folder)

TorchEngine.save_state = half
run_training(load(RunConfig, sys.argv[1]), Path(sys.argv[2]))
"""


def test_run_killed_while_saving_resumes_from_the_previous_checkpoint(
    config: RunConfig, tmp_path: Path, uninterrupted: Path
) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(configs.dump(config))
    process = skillsd_process(["-c", KILLED_WHILE_SAVING, str(recipe), str(folder)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [".step-4.partial", "step-2"]
    assert [r["iteration"] for r in records(folder)] == [1, 2, 3, 4]  # further than the checkpoint
    with open(folder / METRICS, "a") as file:
        file.write('{"iteration": 5, "cut sh')
    assert run_training(config, folder, resume=True)
    assert_same_run(folder, uninterrupted)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-6"]


def test_run_without_a_checkpoint_starts_again(
    config: RunConfig, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(run: Any) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fails)
        with pytest.raises(OSError, match="No space"):
            run_training(config, tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        run_training(config, tmp_path / "run")
    assert run_training(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("part", "phase"), [("_decode", "sampling"), ("_score", "scoring"), ("_step", "updating the weights")]
)
def test_run_out_of_memory_is_one_line_and_can_be_resumed(
    part: str, phase: str, uninterrupted: Path, config: RunConfig, tmp_path: Path
) -> None:
    folder, works = tmp_path / "run", getattr(TorchEngine, part)

    def fails_after_a_checkpoint(*given: Any) -> Any:
        if (folder / "checkpoints" / "step-2").exists():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return works(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, part, fails_after_a_checkpoint)
        with pytest.raises(EngineFailedError, match=f"out of memory while {phase}.*--resume"):
            run_training(config, folder)
    assert run_training(config, folder, resume=True)
    assert_same_run(folder, uninterrupted)


def test_ctrl_c_saves_a_checkpoint_and_prints_the_resume_command(
    tiny_model: Path, config: RunConfig, tmp_path: Path, uninterrupted: Path
) -> None:
    slow = toy_settings(tiny_model, environment={"options": {"delay": 0.02}})
    recipe, folder = tmp_path / "a recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(slow))
    process = skillsd_process(["-m", "skillsd", "train", str(recipe), "--out", str(folder)])
    deadline = time.monotonic() + 120
    while not records(folder) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"skillsd train '{recipe}' --out {folder} --resume" in output
    done = len(records(folder))
    assert 1 <= done < 6
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.name == f"step-{done}"

    assert run_training(RunConfig.model_validate(slow), folder, resume=True)
    assert_same_run(folder, uninterrupted)  # the delay changes nothing


def test_second_ctrl_c_stops_at_once_without_a_traceback(tiny_model: Path, tmp_path: Path) -> None:
    slow = toy_settings(tiny_model, environment={"options": {"delay": 0.2}})
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(slow))
    process = skillsd_process(["-m", "skillsd", "train", str(recipe), "--out", str(folder)])
    assert process.stdout is not None
    deadline = time.monotonic() + 120
    while not (folder / "config.yaml").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again: stop at once" in output
    assert errors == "stopped\n"


def test_run_killed_during_its_setup_starts_again(config: RunConfig, tmp_path: Path) -> None:
    short = changed(config, training={"iterations": 1})
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    for name in ("skills.sqlite", "skills.sqlite-wal", "manifest.json"):
        (folder / name).write_text("half")
    with pytest.raises(UserError, match="files that are not a run's"):  # without resume nothing is deleted
        run_training(short, folder)
    (folder / "thesis.tex").write_text("text")
    with pytest.raises(UserError, match="files that are not a run's"):
        run_training(short, folder, resume=True)
    assert (folder / "skills.sqlite").read_text() == "half"
    (folder / "thesis.tex").unlink()
    assert run_training(short, folder, resume=True)
