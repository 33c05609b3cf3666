"""The Python API, on the toy environment."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_run import toy_settings, without_clocks

import skillsd
from skillsd.config import RunConfig

SHORT = {"training": {"iterations": 3, "learning_rate": 3e-3}, "checkpoint": {"every": 1}}


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> RunConfig:
    return skillsd.load_recipe(toy_settings(tiny_model, **SHORT))


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> skillsd.OpenRun:
    """A finished run of three iterations."""
    torch.set_num_threads(1)
    return skillsd.train(config, out=tmp_path_factory.mktemp("api") / "run")


def comparable(evaluation: skillsd.Evaluation) -> skillsd.Evaluation:
    return dataclasses.replace(evaluation, seconds=0.0)


# -- the package ----------------------------------------------------------------------------------------------------


def test_every_public_name_resolves() -> None:
    for name in skillsd.__all__:
        assert getattr(skillsd, name) is not None
    assert set(skillsd.__all__) <= set(dir(skillsd))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        skillsd.trian  # noqa: B018


@pytest.mark.parametrize(
    "script",
    [
        "import skillsd",
        "from skillsd import Environment, Message, Skill, Step, Task, TaskSet, Trajectory, UserError",
        "from skillsd import Bank; Bank(':memory:').close()",
    ],
)
def test_import_is_light(script: str) -> None:
    check = "import sys; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", f"{script}\n{check}"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# -- load_recipe ----------------------------------------------------------------------------------------------------


def test_load_recipe_by_name_path_and_mapping(tiny_model: Path, tmp_path: Path) -> None:
    shipped = skillsd.load_recipe("sokoban-nano", "training.iterations=12", seed=4)
    assert (shipped.training.iterations, shipped.seed) == (12, 4)
    settings = toy_settings(tiny_model)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert skillsd.load_recipe(path) == skillsd.load_recipe(str(path)) == skillsd.load_recipe(settings)


def test_sections_are_merged_into_the_recipes(config: RunConfig, tiny_model: Path) -> None:
    changed = skillsd.load_recipe(toy_settings(tiny_model, **SHORT), training={"iterations": 1}, method="grpo")
    assert (changed.training.iterations, changed.method) == (1, "grpo")
    assert changed.training.learning_rate == config.training.learning_rate


@pytest.mark.parametrize(
    ("recipe", "overrides", "sections", "message"),
    [
        ("sokoban-nan", [], {}, "Did you mean 'sokoban-nano'"),
        ("no/such.yaml", [], {}, "there is no recipe file"),
        ("sokoban-nano", ["training.iteratons=1"], {}, "'training.iterations'"),
        ("sokoban-nano", ["seed"], {}, "key=value"),
        ("sokoban-nano", [], {"trainig": {"iterations": 1}}, "trainig"),
        ("sokoban-nano", [], {"training": {"iterations": "many"}}, "training.iterations is 'many'"),
        ({"name": "x", "method": "gpro"}, [], {}, "'grpo'"),
        ({"name": "x"}, ["seed=1"], {}, "put them into the mapping"),
    ],
)
def test_mistakes_in_a_recipe(recipe: Any, overrides: list[str], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(skillsd.UserError) as error:
        skillsd.load_recipe(recipe, *overrides, **sections)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- train ----------------------------------------------------------------------------------------------------------


def test_train_returns_the_run_and_reports_records(config: RunConfig, tmp_path: Path) -> None:
    records: list[tuple[str, Mapping[str, Any]]] = []
    run = skillsd.train(config, out=tmp_path / "run", on_record=lambda kind, record: records.append((kind, record)))
    assert run.folder == tmp_path / "run"
    assert run.config == config
    assert [kind for kind, _ in records] == [
        "evaluation",
        "iteration",
        "iteration",
        "evaluation",
        "iteration",
        "evaluation",
    ]
    assert [r["rollout/reward"] for kind, r in records if kind == "iteration"] == [
        record["rollout/reward"] for record in run.metrics
    ]


def test_train_takes_a_recipe_and_has_a_default_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(toy_settings(tiny_model)))
    run = skillsd.train("toy.yaml", "training.iterations=1", "seed=3")
    assert run.folder == Path("runs/toy-skill-sd-seed3")
    assert len(run.metrics) == 1


def test_train_resumes(config: RunConfig, run: skillsd.OpenRun, tmp_path: Path) -> None:
    shorter = config.model_copy(update={"training": config.training.model_copy(update={"iterations": 1})})
    assert len(skillsd.train(shorter, out=tmp_path / "run").metrics) == 1
    with pytest.raises(skillsd.UserError, match="holds a run already"):
        skillsd.train(config, out=tmp_path / "run")
    resumed = skillsd.train(config, out=tmp_path / "run", resume=True)
    assert without_clocks(resumed.metrics) == without_clocks(run.metrics)


def _train_in_a_loop(config: RunConfig, folder: Path) -> skillsd.OpenRun:
    async def cell() -> skillsd.OpenRun:
        return skillsd.train(config, out=folder)

    return asyncio.run(cell())


def _train_async(config: RunConfig, folder: Path) -> skillsd.OpenRun:
    return asyncio.run(skillsd.train_async(config, out=folder))


@pytest.mark.parametrize("train", [_train_in_a_loop, _train_async])
def test_train_in_an_event_loop_gives_the_same_run(
    train: Callable[..., skillsd.OpenRun], config: RunConfig, run: skillsd.OpenRun, tmp_path: Path
) -> None:
    other = train(config, tmp_path / "run")
    assert without_clocks(other.metrics) == without_clocks(run.metrics)
    assert other.skills == run.skills


def test_mistakes_in_training(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(skillsd.UserError, match="pass them to load_recipe"):
        skillsd.train(config, "seed=1", out=tmp_path / "run")
    changes = {"method": "opd-external"}
    with pytest.raises(skillsd.UserError, match=r"teacher\.model is None"):
        skillsd.train(config.model_copy(update=changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

    async def cell() -> None:
        skillsd.train(config.model_copy(update=changes), out=tmp_path / "run")

    with pytest.raises(skillsd.UserError, match=r"teacher\.model is None"):
        asyncio.run(cell())


# -- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_a_run(run: skillsd.OpenRun) -> None:
    result = skillsd.evaluate(run)
    assert (result.split, result.tasks, result.episodes) == ("test", 3, 3)
    assert comparable(skillsd.evaluate(str(run.folder))) == comparable(result)
    assert comparable(skillsd.evaluate(run, iteration=3)) == comparable(result)
    assert skillsd.evaluate(run, split="tune", samples=3, limit=2).episodes == 6
    greedy = skillsd.evaluate(run, samples=3, temperature=0)
    assert (greedy.temperature, greedy.episodes) == (0, 3)


def test_evaluate_a_model(run: skillsd.OpenRun, config: RunConfig, tiny_model: Path) -> None:
    trained = skillsd.evaluate(run.model_folder(), recipe=config, samples=4)
    assert comparable(trained) == comparable(skillsd.evaluate(run, samples=4))
    untrained = skillsd.evaluate(tiny_model, recipe=config, samples=4)
    assert comparable(untrained) != comparable(trained)


def test_evaluate_in_an_event_loop(run: skillsd.OpenRun) -> None:
    async def cell() -> tuple[skillsd.Evaluation, skillsd.Evaluation]:
        return skillsd.evaluate(run), await skillsd.evaluate_async(run)

    expected = comparable(skillsd.evaluate(run))
    assert list(map(comparable, asyncio.run(cell()))) == [expected, expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "/no/such/run"}, "is not a run's folder; for a model, give a `recipe`"),
        ({"recipe": "sokoban-nano"}, "has its own recipe"),
        ({"iteration": 9}, "has no checkpoint of iteration 9; it has: 2, 3"),
        ({"split": "tets"}, "Did you mean 'test'"),
        ({"samples": 0}, "samples is 0; expected 1 or more"),
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 or more"),
        ({"target": "/no/such/model", "recipe": "sokoban-nano"}, "/no/such/model"),
        ({"target": "nano", "recipe": "sokoban-nano", "iteration": 3}, "not for a model"),
    ],
)
def test_mistakes_in_an_evaluation(run: skillsd.OpenRun, options: dict[str, Any], message: str) -> None:
    with pytest.raises(skillsd.UserError) as error:
        skillsd.evaluate(**{"target": run, **options})
    assert message in str(error.value)


# -- open_run -------------------------------------------------------------------------------------------------------


def test_records_are_flat_and_json(run: skillsd.OpenRun) -> None:
    opened = skillsd.open_run(run.folder)
    tables = {name: getattr(opened, name) for name in ("metrics", "evaluations", "episodes", "skills")}
    for name, records in tables.items():
        assert records, name
        assert isinstance(records, list)
        assert json.loads(json.dumps(records)) == records
        for record in records:
            assert all(value is None or isinstance(value, int | float | str) for value in record.values()), name
    assert [record["iteration"] for record in opened.metrics] == [1, 2, 3]
    assert [record["iteration"] for record in opened.evaluations] == [0, 2, 3]
    assert opened.evaluations[0]["eval/interval_low"] <= opened.evaluations[0]["eval/accuracy"]
    assert len(opened.episodes) == 3 * 12
    assert [skill["id"] for skill in opened.skills] == [skill.id for skill in opened.stored_skills]


def test_trajectories(run: skillsd.OpenRun) -> None:
    assert run.iterations_with_trajectories == [1, 2, 3]
    trajectories = list(run.trajectories(2))
    assert len(trajectories) == 12
    assert json.dumps([dataclasses.asdict(t) for t in trajectories])
    episodes = [episode for episode in run.episodes if episode["iteration"] == 2]
    assert [episode["reward"] for episode in episodes] == [t.reward for t in trajectories]
    groups = list(run.groups(2))
    assert [group.iteration for group in groups] == [2, 2, 2]
    assert [t for group in groups for t in group.trajectories] == trajectories
    gaps = [episode.gaps for group in groups for episode in group.episodes]
    assert [episode["gap"] for episode in episodes] == [gap and pytest.approx(sum(gap) / len(gap)) for gap in gaps]
    assert run.objective(2).lambda_sdl == 0.1
    assert [t.task.id for t in run.trajectories()] == [episode["task"] for episode in run.episodes]


def test_checkpoints_and_manifest(run: skillsd.OpenRun) -> None:
    assert run.checkpoints == [2, 3]
    assert run.model_folder() == run.model_folder(3) == run.folder / "checkpoints" / "step-3" / "model"
    assert (run.model_folder(2) / "config.json").is_file()
    assert run.manifest["seed"] == 0
    assert repr(run) == f"<run {str(run.folder)!r}: skill-sd, 3 iterations>"


def test_opening_changes_nothing(run: skillsd.OpenRun) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}

    before = content()
    opened = skillsd.open_run(run.folder)
    assert all([opened.metrics, opened.evaluations, opened.episodes, opened.skills, opened.manifest])
    assert content() == before


def test_run_in_progress_can_be_opened(config: RunConfig, run: skillsd.OpenRun, tmp_path: Path) -> None:
    """The last line of a file may be incomplete."""
    folder = tmp_path / "run"
    (folder / "trajectories").mkdir(parents=True)
    (folder / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    opened = skillsd.open_run(folder)
    assert (opened.metrics, opened.evaluations, opened.episodes, opened.skills, opened.checkpoints) == (
        [],
        [],
        [],
        [],
        [],
    )
    (folder / "metrics.jsonl").write_bytes((run.folder / "metrics.jsonl").read_bytes()[:-40])
    (folder / "trajectories" / ".iteration-00001.jsonl.gz.partial").write_bytes(b"\x1f\x8b")
    assert len(opened.metrics) == 2
    assert opened.episodes == []


def test_mistakes_in_opening(run: skillsd.OpenRun, tmp_path: Path) -> None:
    with pytest.raises(skillsd.UserError, match="is not a run's folder"):
        skillsd.open_run(tmp_path)
    with pytest.raises(skillsd.UserError, match="no trajectories of iteration 9; it has: 1, 2, 3"):
        list(run.trajectories(9))
    with pytest.raises(skillsd.UserError, match="no checkpoint of iteration 1; it has: 2, 3"):
        run.model_folder(1)
    folder = tmp_path / "run"
    (folder / "trajectories").mkdir(parents=True)
    (folder / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    (folder / "trajectories" / "iteration-00001.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(skillsd.UserError, match=r"00001\.jsonl\.gz' is damaged \(line 1: not a group's record"):
        list(skillsd.open_run(folder).trajectories())
    (folder / "trajectories" / "iteration-00001.jsonl.gz").rename(folder / "trajectories" / "iteration-00001.jsonl")
    with pytest.raises(skillsd.UserError, match=r"00001\.jsonl' has an earlier version's format, which"):
        _ = skillsd.open_run(folder).episodes
    with pytest.raises(skillsd.UserError, match=r"manifest\.json.* can.t be read"):
        skillsd.open_run(folder).manifest  # noqa: B018
