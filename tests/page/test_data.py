"""What a report says: the same numbers as in the records, and what is missing in words. No browser."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import make_run
from scipy import stats

from skillsd.errors import UserError
from skillsd.files.lock import locked
from skillsd.page.curves import means, metric_columns
from skillsd.page.data import Report, build
from skillsd.page.episodes import chunk, difference
from skillsd.page.sample import sampled
from skillsd.page.subject import LabelledRun, open_subject
from skillsd.report.writer import METRICS, TRAJECTORIES, read
from skillsd.rollouts.groups import write_groups
from skillsd.runs.folder import LOCK
from skillsd.runs.opened import open_run
from skillsd.skills.ucb import ucb_score


def opened(report: Report, name: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(report.chunks[name])))


@pytest.fixture(scope="module")
def report(run_folder: Path) -> Report:
    return build(open_subject(run_folder))


# -- episodes and tokens --------------------------------------------------------------------------------------------


def test_tokens_have_the_values_of_the_records(report: Report, run_folder: Path) -> None:
    [*_, last] = open_run(run_folder).iterations_with_trajectories
    groups = list(open_run(run_folder).groups(last))
    taught = 0
    for group, shown in zip(groups, opened(report, f"0-{last}")["groups"], strict=True):
        for episode, made in zip(group.episodes, shown["episodes"], strict=True):
            tokens, trajectory = made["tokens"], episode.trajectory
            assert tokens["student"] == pytest.approx(episode.student_logprobs, rel=1e-3, abs=1e-4)
            assert len(tokens["text"]) == trajectory.action_tokens
            for turn, own in zip(made["turns"], trajectory.turns, strict=True):
                begin, end = turn["tokens"]
                assert "".join(tokens["text"][begin:end]) == own.action
            if not group.taught:
                assert "gap" not in tokens
                assert "teacher" not in tokens
                continue
            taught += 1
            ratio = [p - q for p, q in zip(episode.student_logprobs or (), episode.teacher_logprobs or (), strict=True)]
            assert tokens["gap"] == pytest.approx(ratio, abs=2e-3)
            rho = [math.exp(p - o) for p, o in zip(episode.student_logprobs or (), episode.old_logprobs, strict=True)]
            assert tokens["ratio"] == pytest.approx(rho, rel=2e-3)
            k3 = [r * (math.exp(-x) - 1 + x) for r, x in zip(rho, ratio, strict=True)]
            wanted = [0.1 * value - r * episode.advantage for value, r in zip(k3, rho, strict=True)]
            total = sum(e.trajectory.action_tokens for g in groups for e in g.episodes)
            unclipped = [not clipped for clipped in tokens["clipped"]]
            for share, value, plain in zip(tokens["share"], wanted, unclipped, strict=True):
                if plain:  # k3 as made up lacks rho, which is within 10 % of 1
                    assert share == pytest.approx(value / total, rel=0.1, abs=2e-3 / total * 10)
    assert taught


def test_the_index_has_a_row_per_episode(report: Report, run_folder: Path) -> None:
    index, run = report.light["runs"][0]["episodes"], open_run(run_folder)
    rows = [(n, e) for n in (1, 2, 3) for g in run.groups(n) for e in g.episodes]
    assert index["iteration"] == [n for n, _ in rows]
    assert [index["tasks"][place] for place in index["task"]] == [e.trajectory.task.id for _, e in rows]
    assert index["turns"] == [len(e.trajectory.turns) for _, e in rows]
    for gap, (_, episode) in zip(index["gap"], rows, strict=True):
        gaps = episode.gaps
        assert gap is None if gaps is None else gap == pytest.approx(-sum(gaps) / len(gaps), abs=1e-3)


def test_numbers_that_are_not_finite_become_null(run_folder: Path, tmp_path: Path) -> None:
    run = open_run(run_folder)
    [group, *rest] = run.groups(3)
    [episode, *others] = group.episodes
    bad = (math.nan, math.inf, *(episode.student_logprobs or ())[2:])
    group = dataclasses.replace(group, episodes=(dataclasses.replace(episode, student_logprobs=bad), *others))
    content = chunk([group, *rest], run.objective(3), run.picture)
    assert content["groups"][0]["episodes"][0]["tokens"]["student"][:2] == [None, None]
    json.dumps(content, allow_nan=False)


WORDS = st.lists(st.sampled_from(["a", "b", " ", "\n", "<x>", "é"]), max_size=12).map("".join)


@given(WORDS, WORDS)
def test_the_difference_of_prompts_rebuilds_both(student: str, teacher: str) -> None:
    parts = difference(student, teacher)
    assert "".join(text for kind, text in parts if kind in "=-") == student
    assert "".join(text for kind, text in parts if kind in "=+") == teacher


def test_an_inserted_skill_is_one_insertion() -> None:
    assert difference("<user>Sokoban: x<end>", "<user>Do this.\n\nSokoban: x<end>") == [
        ["=", "<user>"],
        ["+", "Do this.\n\n"],
        ["=", "Sokoban: x<end>"],
    ]


# -- which episodes are shown ---------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(1, 500), st.tuples(st.integers(1, 50), st.integers(1, 900)), min_size=1), st.data())
def test_the_sample_fits_and_keeps_the_ends(sizes: dict[int, tuple[int, int]], data: st.DataObject) -> None:
    episodes, tokens = data.draw(st.integers(1, 2000)), data.draw(st.integers(1, 20_000))
    chosen = sampled(sizes, episodes=episodes, tokens=tokens)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= sizes.keys()
    assert max(chosen) == max(sizes)
    if len(chosen) > 1:
        assert min(chosen) == min(sizes)
        assert sum(sizes[n][0] for n in chosen) <= episodes
        assert sum(sizes[n][1] for n in chosen) <= tokens
    fits_all = sum(size for size, _ in sizes.values()) <= episodes and sum(size for _, size in sizes.values()) <= tokens
    assert not fits_all or chosen == sorted(sizes)


def test_a_sample_says_so(run_folder: Path) -> None:
    report = build(open_subject(run_folder), episodes=24)
    run = report.light["runs"][0]
    assert [one["iteration"] for one in run["iterations"]] == [1, 3]
    assert "2 iterations, of the 3 of 3" in run["sampling"]
    assert "evenly spaced" in run["sampling"]
    whole = build(open_subject(run_folder)).light["runs"][0]
    assert "all that the run wrote" in whole["sampling"]


def test_the_same_run_gives_the_same_report(run_folder: Path, report: Report) -> None:
    again = build(open_subject(run_folder))
    assert again.chunks == report.chunks
    assert {**again.light, "written": ""} == {**report.light, "written": ""}


# -- overview -------------------------------------------------------------------------------------------------------


def test_a_run_is_finished_stopped_or_running(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=1, tasks=1, wanted=5)

    def state() -> dict[str, str]:
        found: dict[str, str] = build(open_subject(folder)).light["runs"][0]["state"]
        return found

    assert state() == {"name": "stopped", "text": "stopped early: 1 of 5 iterations"}
    with locked(folder / LOCK, "it", "wait"):
        assert state()["name"] == "running"
        assert build(open_subject(folder)).running
    assert state()["name"] == "stopped"
    assert build(open_subject(make_run(tmp_path / "done", iterations=1, tasks=1))).light["runs"][0]["state"][
        "name"
    ] == ("finished")


def test_health_is_in_words(report: Report, tmp_path: Path) -> None:
    words = [line["text"] for line in report.light["runs"][0]["health"]]
    assert any("In the first 2 of 3 iterations it scored none" in text for text in words), words
    assert report.light["runs"][0]["health"][0]["level"] == "good"
    folder = make_run(tmp_path / "run", iterations=4, tasks=1)
    lines = [{**record, "step/applied": 0, "step/refused": 2} for record in read(folder / METRICS)]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    [first, *_] = build(open_subject(folder)).light["runs"][0]["health"]
    assert first["level"] == "bad"
    assert "in 4 of 4 iterations" in first["text"]
    assert "learning_rate" in first["cure"]


# -- skills ---------------------------------------------------------------------------------------------------------


def test_skills_have_their_source_score_and_uplift(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=5, tasks=1)
    bank = open_run(folder).stored_skills
    measured = {
        "iteration": 5,
        "skills": [{"id": bank[0].id, "uplift": {"success_with": 0.75, "success_without": 0.5, "episodes": 8}}],
        "summary": {"all": {"success": 0.25, "success_interval": [0.1, 0.4], "tasks": 1, "skills": 1}},
    }
    (folder / "uplift.json").write_text(json.dumps(measured))
    view = build(open_subject(folder)).light["runs"][0]["skills"]
    columns = view["columns"]
    for place, number in enumerate(columns["id"]):
        stored = next(s for s in bank if s.id == number)
        total = sum(s.picks for s in bank if s.task_id == stored.task_id)
        wanted = ucb_score(stored.mean_reward, stored.picks, total, view["ucb_c"]) if stored.picks else None
        assert columns["score"][place] == (None if wanted is None else pytest.approx(wanted, rel=1e-3))
        iteration, task, member = columns["source"][place]
        assert stored.source == f"iteration-{iteration}/{task}/{member}"
    assert None in columns["score"], "one was never picked"
    assert columns["uplift"][columns["id"].index(bank[0].id)] == [0.75, 0.5, 8]
    assert view["uplift"]["mean"] == 0.25
    assert view["uplift"]["interval"] == [0.1, 0.4]
    assert view["summaries"]["rejected_too_long"] == 5
    (folder / "uplift.json").write_text('{"skills": [{}], "summary": {"all": {}}, "iteration": 1}')
    with pytest.raises(UserError, match=r"uplift.json' is not a measured uplift .*skillsd skills uplift"):
        build(open_subject(folder))


# -- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_has_the_figures_of_table_json(table_folder: Path) -> None:
    light = build(open_subject(table_folder)).light
    table = json.loads((table_folder / "table.json").read_text())
    [budget] = light["table"]["budgets"]
    for row in budget["rows"]:
        name = row["method"]
        assert {key: value for key, value in row.items() if key != "method"} == table["budgets"]["16"][name]
    assert [run["label"] for run in light["runs"]] == [
        "grpo, seed 0", "grpo, seed 1", "skill-sd, seed 0", "skill-sd, seed 1"
    ]  # fmt: skip


def test_a_table_is_running_while_its_folder_is_locked(table_folder: Path) -> None:
    """Between two of its commands, none of its runs is training."""
    assert not build(open_subject(table_folder), reload_seconds=5).running
    with locked(table_folder / LOCK, "it", "wait"):
        report = build(open_subject(table_folder), reload_seconds=5)
    assert report.running
    assert report.light["reload"] == 5


def test_means_are_over_seeds_with_students_t(table_folder: Path) -> None:
    light = build(open_subject(table_folder)).light
    entropy = [run["series"]["metrics"]["rollout/entropy_estimate"] for run in light["runs"][:2]]
    found = light["means"]["grpo"]["metrics"]
    for place, pair in enumerate(zip(*entropy, strict=True)):
        mean = sum(pair) / 2
        reach = stats.t.ppf(0.975, 1) * abs(pair[0] - pair[1]) / 2
        assert found["rollout/entropy_estimate"][place] == pytest.approx(mean, rel=1e-3)
        assert found["rollout/entropy_estimate_low"][place] == pytest.approx(max(0, mean - reach), abs=2e-3)
        assert found["rollout/entropy_estimate_high"][place] == pytest.approx(mean + reach, abs=2e-3)


# -- what is missing or damaged -------------------------------------------------------------------------------------


@pytest.fixture
def own(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "does not exist: expected the folder of a run"),
        (lambda path: path.write_text("x"), "is a file: expected the folder"),
        (lambda path: path.mkdir(), "is neither a run's folder"),
    ],
)
def test_what_is_no_run(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "other")
    with pytest.raises(UserError, match=words):
        open_subject(tmp_path / "other")


def test_a_damaged_iteration_is_left_out_with_a_note(own: Path) -> None:
    file = own / TRAJECTORIES / "iteration-00002.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-20])
    run = build(open_subject(own)).light["runs"][0]
    assert [one["iteration"] for one in run["iterations"]] == [1, 3]
    assert "iteration-00002" in run["missing"][0]
    assert "damaged" in run["missing"][0]


def test_an_earlier_format_is_named(own: Path) -> None:
    folder = own / TRAJECTORIES
    (folder / "iteration-00002.jsonl.gz").unlink()
    (folder / "iteration-00002.jsonl").write_text('{"format": 2}\n')
    run = build(open_subject(own)).light["runs"][0]
    assert "earlier version" in run["missing"][0]


def test_damaged_metrics_are_an_error(own: Path) -> None:
    (own / METRICS).write_text('{"iteration": 1}\n{"iter\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl' is damaged \(line 2"):
        build(open_subject(own))


def test_a_run_that_is_being_written(own: Path) -> None:
    """Its last line is incomplete, and the iteration's episodes are there before its metrics."""
    text = (own / METRICS).read_text()
    (own / METRICS).write_text(text[: len(text) - 30])
    run = build(open_subject(own)).light["runs"][0]
    assert run["series"]["metrics"]["iteration"] == [1, 2]
    assert [one["iteration"] for one in run["iterations"]] == [1, 2]


def test_a_run_without_anything(own: Path) -> None:
    for name in (METRICS, "evaluations.jsonl", "manifest.json", "skills.sqlite"):
        (own / name).unlink()
    shutil.rmtree(own / TRAJECTORIES)
    run = build(open_subject(own)).light["runs"][0]
    assert run["iterations"] == []
    assert run["skills"] is None
    assert run["accuracy"] == []
    assert run["health"] == []
    assert run["sampling"] == "The run wrote no episodes yet."
    assert dict(run["facts"])["commit"] == "unknown"


def test_a_damaged_table_is_an_error(table_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(table_folder, tmp_path / "table"))
    (folder / "table.json").write_text('{"split": "test"}')
    with pytest.raises(UserError, match=r"table.json' is not a table .*make the table again"):
        build(open_subject(folder))
    (folder / "table.json").unlink()
    assert "no table.json yet" in build(open_subject(folder)).light["table"]["missing"]


def test_episodes_without_tokens_are_shown_as_text(run_folder: Path, tmp_path: Path) -> None:
    """A model behind an endpoint gives no ids."""
    run = open_run(run_folder)
    group = next(iter(run.groups(1)))
    bare = [
        dataclasses.replace(
            episode,
            student_logprobs=None,
            trajectory=dataclasses.replace(
                episode.trajectory,
                tokens=(), action_mask=(), logprobs=(), prompt_length=0,
                turns=tuple(dataclasses.replace(turn, start=0, end=0) for turn in episode.trajectory.turns),
            ),
        )
        for episode in group.episodes
    ]  # fmt: skip
    group = dataclasses.replace(group, episodes=tuple(bare))
    write_groups(tmp_path, 1, [group])
    turn = chunk([group], run.objective(1), run.picture)["groups"][0]["episodes"][0]["turns"][0]
    assert turn["tokens"] == [0, 0]
    assert turn["action"]


def test_reading_is_a_curve_that_may_be_below_zero_and_has_gaps() -> None:
    records = [{"iteration": 1, "episodes": 8}, {"iteration": 2, "episodes": 24, "reading/gap": -0.125}]
    assert metric_columns(records)["reading/gap"] == [None, -0.125]
    assert "reading/gap" not in metric_columns(records[:1])
    runs = [
        (LabelledRun(None, "base", "m", seed), {"metrics": metric_columns(records), "evaluations": {}})  # type: ignore[arg-type]
        for seed in (0, 1)
    ]
    assert means(runs)["m"]["metrics"]["reading/gap"] == [None, -0.125]
