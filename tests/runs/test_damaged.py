"""Truncated or overwritten files of a run: one error that names the file and what to do, and nothing is changed."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import toy_settings

from skillsd.config import RunConfig
from skillsd.errors import UserError
from skillsd.report.writer import EVALUATIONS, METRICS
from skillsd.runs.api import open_run
from skillsd.runs.export import export
from skillsd.runs.lifecycle import run_training
from skillsd.runs.subjects import load_trained


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = toy_settings(tiny_model, training={"iterations": 2}, checkpoint={"every": 1})
    assert run_training(RunConfig.model_validate(settings), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def resume(folder: Path) -> None:
    run_training(open_run(folder).config, folder, resume=True)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the bank, which has been restored before the metrics are read."""
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "skills.sqlite"}


def truncated(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def flipped(content: bytes) -> bytes:
    """As a bad sector leaves it: the length is right."""
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]


def edited(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        state = json.loads(content)
        change(state)
        return json.dumps(state).encode()

    return edit


def empty(content: bytes) -> bytes:
    return b""


WRONG_STATES: list[Callable[[Any], object]] = [
    lambda s: s.update(iteration="2"),
    lambda s: s.update(iteration=1),
    lambda s: s.update(totals={"episodes": 3}),
    lambda s: s.update(totals={**s["totals"], "seconds": None}),
    lambda s: s.update(visits={"train-0": "1"}),
    lambda s: s.update(visits=[]),
    lambda s: s.update(pending_summaries=[{"source": "x"}]),
    lambda s: s.update(pending_summaries=[3]),
    lambda s: s.update(summary_stats={"added": "x"}),
    lambda s: s.update(best_successes=[]),
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", empty),
        ("state.json", truncated(0.5)),
        ("state.json", flipped),
        *[("state.json", edited(change)) for change in WRONG_STATES],
        ("skills.sqlite", truncated(0.5)),
        ("skills.sqlite", lambda content: b"text" * 1000),
    ],
)
def test_a_damaged_checkpoint_is_named(name: str, damage: Any, run: Path) -> None:
    """With an older one, it is used instead: tests/runs/test_resume.py."""
    shutil.rmtree(run / "checkpoints" / "step-1")
    path = run / "checkpoints" / "step-2" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        resume(run)
    assert f"{str(path)!r} is" in str(error.value)
    assert "\n" not in str(error.value)
    assert path.exists()


@pytest.mark.parametrize("damage", [empty, truncated(0.1), truncated(0.9), truncated(0.999), flipped])
def test_damaged_weights(damage: Any, run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step-2" / "engine.pt"
    path.write_bytes(damage(path.read_bytes()))
    for use in (lambda: asyncio.run(load_trained(run)), lambda: export(run, tmp_path / "out")):
        with pytest.raises(UserError, match=r"engine\.pt' is damaged .*with --at: 1"):
            use()
    assert not (tmp_path / "out").exists()
    asyncio.run(load_trained(run, 1))[0].close()


def test_the_last_checkpoint_that_is_damaged(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-1")
    (run / "checkpoints" / "step-2" / "engine.pt").write_bytes(b"")
    with pytest.raises(UserError, match="the run has no other checkpoint"):
        asyncio.run(load_trained(run))


@pytest.mark.parametrize("name", [METRICS, EVALUATIONS])
@pytest.mark.parametrize("line", [b'{"iteration": ', b"[]", b'{"iteration": "1"}', b"\xff", b"\0" * 100])
def test_a_damaged_line_is_named_and_kept(name: str, line: bytes, run: Path) -> None:
    lines = (run / name).read_bytes().split(b"\n")
    (run / name).write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    before = contents(run)
    with pytest.raises(UserError, match=rf"{name}' is damaged \(line 2"):
        resume(run)
    assert contents(run) == before
    with pytest.raises(UserError, match=name):
        len(getattr(open_run(run), name.removesuffix(".jsonl")))


@pytest.mark.parametrize("damage", [empty, truncated(0.5), lambda c: b"[]", lambda c: b"\xff"])
def test_a_damaged_manifest(damage: Any, run: Path) -> None:
    (run / "manifest.json").write_bytes(damage(b'{"panels": {}}'))
    with pytest.raises(UserError, match=r"manifest\.json"):
        resume(run)
    with pytest.raises(UserError, match=r"manifest\.json' is damaged"):
        _ = open_run(run).manifest


@pytest.mark.parametrize("panels", ["3", "[]", "null"])
def test_a_manifest_with_other_content(panels: str, run: Path) -> None:
    (run / "manifest.json").write_text(f'{{"panels": {panels}, "model": 3, "texts": []}}')
    with pytest.raises(UserError, match=r"manifest\.json|have changed"):
        resume(run)


def test_damaged_trajectories_and_skills(run: Path) -> None:
    path = run / "trajectories" / "iteration-00001.jsonl.gz"
    content = path.read_bytes()
    lines = gzip.decompress(content)
    bad_lines = (lines[:-10] + b"\n", b'{"format": 1}\n', b"3\n", b"\xff\n", lines.replace(b'"reward"', b'"r"'))
    bad_files = (content[:-10], content[: len(content) // 2], b"", b"{}", content + b"more", b"\0" + content[1:])
    for damaged, at in [*((gzip.compress(bad), r"\(line ") for bad in bad_lines), *((bad, r"\(") for bad in bad_files)]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"iteration-00001\.jsonl\.gz' is damaged {at}"):
            assert list(open_run(run).trajectories(1))
    path.write_bytes(content)
    assert len(list(open_run(run).trajectories(1))) == 12
    (run / "skills.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(UserError, match=r"skills\.sqlite"):
        _ = open_run(run).skills


@pytest.mark.parametrize("damage", [empty, truncated(0.7), flipped, lambda c: b"\xff\0" * 50])
def test_a_damaged_config(damage: Any, run: Path) -> None:
    path = run / "config.yaml"
    path.write_bytes(damage(path.read_bytes()))
    with suppress(UserError):  # a cut YAML file may still be a valid one
        open_run(run)
