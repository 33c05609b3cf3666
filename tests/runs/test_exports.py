"""Exported trajectories are read back by the libraries that they are for; without a library the test is skipped."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_run import FAILED, HOSTILE, SOLVED, TASK, group, recorded_run

from skillsd.errors import UserError
from skillsd.rollouts.groups import RecordedEpisode, write_groups
from skillsd.runs.exports import FORMATS, NamedEpisode, named_episodes
from skillsd.runs.opened import OpenRun, open_run


@pytest.fixture
def run(tmp_path: Path) -> OpenRun:
    """Iterations 1 and 3, and 4 with values that are not finite and half a surrogate pair."""
    folder = recorded_run(tmp_path / "run")
    [turn] = replace(SOLVED.trajectory, turns=SOLVED.trajectory.turns[:1]).turns
    trajectory = replace(FAILED.trajectory, turns=(replace(turn, action="half \ud83d"), *FAILED.trajectory.turns[1:]))
    odd = RecordedEpisode(trajectory, 0.0, (-math.inf, 0.0, -1.0), (math.nan, -1.0, -1.0))
    write_groups(folder / "trajectories", 4, [group(4, odd, SOLVED)])
    return open_run(folder)


def episodes_of(run: OpenRun) -> list[NamedEpisode]:
    return list(named_episodes(run, run.iterations_with_trajectories))


def export(run: OpenRun, to: str, out: Path) -> str:
    return FORMATS[to].write(run, episodes_of(run), out)


def test_json_lines(run: OpenRun, tmp_path: Path) -> None:
    out = tmp_path / "episodes.jsonl"
    export(run, "jsonl", out)
    strict: Any = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    lines = [json.loads(line, **strict) for line in out.read_text().splitlines()]
    assert [line["episode"] for line in lines] == ["1.0.0", "1.0.1", "3.0.0", "3.0.1", "3.1.0", "4.0.0", "4.0.1"]
    solved = lines[2]
    assert (solved["task"], solved["outcome"], solved["reward"], solved["advantage"]) == (TASK.id, "solved", 1.0, 1.0)
    assert (solved["skill"], solved["context_text"], solved["gap"]) == (
        7,
        "Workflow: Right Right",
        pytest.approx(-0.375),
    )
    assert [m["role"] for m in solved["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in solved["messages"][1::2]] == ["Right", "Right"]
    assert solved["tokens_by_turn"][0] == {
        "tokens": [3],
        "logprobs": [-0.6931],
        "student_logprobs": [-0.6931],
        "teacher_logprobs": [-0.1931],
    }
    assert lines[4]["messages"][0]["content"] == HOSTILE
    odd = lines[5]
    assert odd["gap"] is None
    assert [odd["tokens_by_turn"][0][name] for name in ("student_logprobs", "teacher_logprobs")] == [[None], [None]]
    assert odd["messages"][1]["content"] == "half ?"


def test_inspect_reads_its_log(run: OpenRun, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="inspect_ai is not installed: pip install 'skillsd[inspect]'")
    from inspect_ai.log import read_eval_log

    out = tmp_path / "logs" / "trajectories.eval"
    out.parent.mkdir()
    assert export(run, "inspect", out) == f"inspect view --log-dir {out.parent}"
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    log = read_eval_log(str(out))
    samples, given = log.samples or [], episodes_of(run)
    assert (log.status, len(samples), len(given)) == ("success", 7, 7)
    assert log.results is not None
    assert {score.name: score.metrics["mean"].value for score in log.results.scores} == {
        "reward": pytest.approx(3 / 7),
        "success": pytest.approx(3 / 7),
    }
    by_name = {sample.metadata["episode"]: sample for sample in samples}
    for episode in given:
        sample = by_name[episode.name]
        assert sample.epoch == episode.member + 1
        assert [(m.role, m.content) for m in sample.messages] == [tuple(m.values()) for m in episode.messages]
        acted = [m.metadata for m in sample.messages if m.role == "assistant"]
        assert acted == episode.turns
        assert sample.scores is not None
        assert sample.scores["reward"].value == episode.episode.trajectory.reward


@pytest.mark.parametrize("models", ["atif", "harbor.models.trajectories"])
def test_atif_is_valid(models: str, run: OpenRun, tmp_path: Path) -> None:
    library = pytest.importorskip(models, reason=f"{models} is not installed: pip install atif harbor")
    export(run, "atif", tmp_path / "atif")
    given = episodes_of(run)
    assert sorted(path.stem for path in (tmp_path / "atif").iterdir()) == sorted(episode.name for episode in given)
    for episode in given:
        text = (tmp_path / "atif" / f"{episode.name}.json").read_text()
        document = library.Trajectory.model_validate_json(text)
        t = episode.episode.trajectory
        assert document.schema_version == "ATIF-v1.7"
        assert document.extra["reward"] == t.reward
        agent = [step for step in document.steps if step.source == "agent"]
        assert [step.metrics.completion_token_ids for step in agent] == [turn["tokens"] for turn in episode.turns]
        assert [step.metrics.logprobs for step in agent] == [turn["logprobs"] for turn in episode.turns]
        if episode.name != "4.0.0":
            assert [step.message for step in agent] == [turn.action for turn in t.turns]
        assert [step.observation.results[0].content for step in agent] == [turn.observation for turn in t.turns]
        assert document.final_metrics.total_completion_tokens == t.action_tokens
        with pytest.raises(ValueError, match=r"sequential|step_id"):  # the library would find a mistake
            library.Trajectory.model_validate_json(text.replace('"step_id": 1', '"step_id": 2'))


def test_trackio_reads_its_traces(run: OpenRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = trackio_storage(tmp_path, monkeypatch)
    assert export(run, "trackio", Path()) == "trackio show --project sokoban-nano"
    given = {episode.name: episode for episode in episodes_of(run)}
    traces = storage.get_traces("sokoban-nano", run="run-trajectories")
    assert {trace["metadata"]["episode"] for trace in traces} == given.keys()
    for trace in traces:
        episode = given[trace["metadata"]["episode"]]
        assert (trace["step"], trace["messages"]) == (episode.group.iteration, episode.messages)
        assert trace["metadata"] == episode.facts


def test_a_run_logs_its_metrics_to_trackio_and_continues_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = trackio_storage(tmp_path, monkeypatch)
    from skillsd.config import LogSection
    from skillsd.report.writer import RunWriter

    options = LogSection(tensorboard=False, trackio="project")
    for resumed_at, iterations in ((None, (1, 2)), (2, (3,))):
        writer = RunWriter(tmp_path, options, name="mine", resumed_at=resumed_at)
        for number in iterations:
            writer.iteration({"iteration": number, "loss/x": number / 2, "nothing": math.nan})
        writer.close()
    assert storage.get_runs("project") == ["mine"]
    logs = [entry for entry in storage.get_logs("project", "mine") if "loss/x" in entry]
    assert [(entry["step"], entry["loss/x"]) for entry in logs] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert not any("nothing" in entry for entry in logs)
    assert capsys.readouterr().out == ""


def trackio_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trackio's own reader, with its data in `tmp_path`."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'skillsd[trackio]'")
    storage = importlib.import_module("trackio.sqlite_storage")
    for name, module in list(sys.modules.items()):  # each module has a copy of the folder
        if name.split(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return storage.SQLiteStorage


@pytest.mark.parametrize(("to", "library"), [("inspect", "inspect_ai"), ("trackio", "trackio")])
def test_a_missing_library_is_named(to: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for name in (f"skillsd.runs.exports.{FORMATS[to].module}", f"{library}.log"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=rf"needs {library}.*: pip install 'skillsd\[{to}\]'"):
        _ = FORMATS[to].write
