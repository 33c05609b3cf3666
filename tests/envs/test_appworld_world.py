"""Our own task world for AppWorld: its generated data, and its tasks in the engine if AppWorld is installed."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from skillsd.envs.appworld import AppWorld, paths
from skillsd.envs.appworld.world import build, tasks, verify
from skillsd.envs.appworld.world.lives import World, make_world
from skillsd.envs.appworld.world.scenarios import SCENARIOS
from skillsd.envs.appworld.world.scenarios.base import FINISH, FINISH_WITH_ANSWER, Draw
from skillsd.errors import UserError

FOLDER = Path(build.__file__).parent


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def specs(world: World) -> list[tasks.TaskSpec]:
    return tasks.make_tasks(world)


def test_scenarios_cover_all_difficulties_and_many_apps() -> None:
    difficulties = Counter(scenario.difficulty for scenario in SCENARIOS.values())
    assert difficulties[1] >= 6
    assert difficulties[2] >= 5
    assert difficulties[3] >= 3
    assert len({app for scenario in SCENARIOS.values() for app in scenario.apps}) >= 6
    assert Counter(scenario.kind for scenario in SCENARIOS.values()) == {"train": 14, "dev": 2, "test": 2}
    for scenario in SCENARIOS.values():
        assert scenario.id.isalnum()  # AppWorld takes the part before "_" as the scenario
        assert 2 <= len(set(scenario.instructions)) <= 3
        assert (scenario.difficulty == 3) == (len(scenario.apps) > 1)
        assert scenario.harms


def test_every_scenario_has_twelve_tasks_and_each_belongs_to_one_split(specs: list[tasks.TaskSpec]) -> None:
    assert Counter(spec.scenario.id for spec in specs) == dict.fromkeys(SCENARIOS, tasks.INSTANCES)
    assert len({spec.id for spec in specs}) == len(specs)
    sizes = Counter(spec.split for spec in specs)
    assert sizes == {"train": 112, "dev": 28, "test": 28, "dev_scenario": 24, "test_scenario": 24}
    assert set(sizes) == set(tasks.SPLITS)


def test_evaluation_shares_no_person_and_no_held_out_scenario_with_training(
    world: World, specs: list[tasks.TaskSpec]
) -> None:
    seen = {"train": set(), "dev": set(), "test": set()}
    for spec in specs:
        person = spec.supervisor
        seen[spec.split.removesuffix("_scenario")] |= {person.email, *person.contacts}
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]
    held_out = {spec.scenario.id for spec in specs if spec.split.endswith("_scenario")}
    assert not held_out & {spec.scenario.id for spec in specs if spec.split == "train"}


def test_splits_share_no_instruction_and_no_solution(specs: list[tasks.TaskSpec]) -> None:
    for kind in ("instruction", "solution"):
        splits = defaultdict(set)
        for spec in specs:
            splits[str(getattr(spec, kind))].add(spec.split)
        assert all(len(found) == 1 for found in splits.values()), kind


def test_evaluation_tasks_have_parameters_of_their_own(specs: list[tasks.TaskSpec]) -> None:
    """Except those with a few fixed values, which all tasks share: sent or received, and relations like "my sister"."""
    splits = defaultdict(set)
    for spec in specs:
        own = {name: value for name, value in spec.parameters.items() if name not in ("direction", "relation")}
        assert own, f"{spec.id}: without parameters, all instances have the same text"
        for name, value in own.items():
            splits[spec.scenario.id, name, value].add(spec.split)
    assert all(len(found) == 1 for found in splits.values())


def test_shared_texts_are_found() -> None:
    one, other = [{"code": "a()"}, {"code": "b()"}], [{"code": "a()"}, {"code": "c()"}]
    assert tasks.problems_of_splits([("x_1", "train", "Do.", one), ("x_2", "train", "Do.", one)]) == []
    assert tasks.problems_of_splits([("x_1", "train", "Do.", one), ("x_2", "dev", "Go.", other)]) == []
    assert tasks.problems_of_splits([("x_1", "train", "Do.", one), ("x_2", "dev", "Do.", one)]) == [
        "x_2 (dev) has the instruction of x_1 (train)",
        "x_2 (dev) has the reference solution of x_1 (train)",
    ]


def test_a_scenario_with_too_few_values_is_rejected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS["songcount"]
    fixed = dataclasses.replace(scenario, draw=lambda world, person, rng: Draw({"artist": "Nova"}, {}, 3))
    monkeypatch.setitem(SCENARIOS, "songcount", fixed)
    with pytest.raises(ValueError, match=r"songcount_9: no unused parameters left for .* in dev"):
        tasks.make_tasks(world)


def test_splits_of_the_built_world_share_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        root = paths.world()
    except UserError as error:
        pytest.skip(str(error))
    built = AppWorld(str(root))
    for kind in ("instruction", "solution"):
        splits = defaultdict(set)
        for task in (task for split in built.splits for task in built.tasks(split)):
            splits[task.payload["instruction"] if kind == "instruction" else built.oracle(task)].add(task.split)
        assert all(len(found) == 1 for found in splits.values()), kind

    monkeypatch.syspath_prepend(str(FOLDER.parent))  # as when verify.py runs as a script
    index = json.loads((root / "data/skillsd.json").read_text())
    assert verify.shared_texts(root, index) == []
    index["splits"]["dev"] = [*index["splits"]["dev"], index["splits"]["train"][0]]
    assert len(verify.shared_texts(root, index)) == 2


def test_tasks_are_unique(specs: list[tasks.TaskSpec]) -> None:
    keys = Counter((spec.scenario.id, spec.supervisor.email, str(spec.parameters)) for spec in specs)
    assert set(keys.values()) == {1}


def test_builds_are_deterministic(specs: list[tasks.TaskSpec]) -> None:
    again = tasks.make_tasks(make_world())
    assert [(s.id, s.instruction, s.expected, s.answer, s.solution) for s in again] == [
        (s.id, s.instruction, s.expected, s.answer, s.solution) for s in specs
    ]


def test_relations_are_mutual(world: World) -> None:
    for person in world.people.values():
        for email in person.contacts:
            assert person.email in world.people[email].contacts
        relations = Counter(relation for relations in person.contacts.values() for relation in relations)
        assert relations["roommate"] == 1
    assert len({person.first_name for person in world.people.values()}) == len(world.people)
    assert len({person.phone_number for person in world.people.values()}) == len(world.people)


def test_paging_is_needed_where_a_solution_uses_it(world: World) -> None:
    for email, life in world.lives.items():
        assert 5 <= len(life.library) <= 20
        assert sum(payment.sender == email for payment in world.payments) > 20
        assert sum(payment.receiver == email for payment in world.payments) > 20


def test_solutions_are_short_and_uniform(specs: list[tasks.TaskSpec]) -> None:
    for spec in specs:
        codes = [turn["code"] for turn in spec.solution]
        assert 3 <= len(codes) <= 5, spec.id
        assert codes[0].startswith("me = apis.supervisor.show_profile()\npasswords = ")
        asks = spec.answer is not None
        assert codes[-1] == (FINISH_WITH_ANSWER if asks else FINISH)
        for code in codes:
            assert len(code.splitlines()) <= 6
            assert len(code) < 300, spec.id
            assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(code)))
        assert all(turn["thought"].endswith(".") for turn in spec.solution)


def test_texts_have_no_unfilled_parameters(specs: list[tasks.TaskSpec]) -> None:
    for spec in specs:
        for text in (spec.instruction, *(turn["code"] for turn in spec.solution)):
            assert "<" not in text, spec.id


def test_solutions_use_only_the_instruction_and_the_apps(specs: list[tasks.TaskSpec]) -> None:
    for spec in specs:
        code = "\n".join(turn["code"] for turn in spec.solution)
        for value in spec.parameters.values():
            assert str(value) in spec.instruction
        for name, value in spec.expected.items():
            for part in value if isinstance(value, list) else [value]:
                given = str(part).lower() in spec.instruction.lower()
                assert given or str(part) not in code, (spec.id, name)
        literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert spec.answer is None or spec.answer not in [x for x in literals if x not in (0, 1, 5, 20, True, False)]


def test_parameters_that_would_break_the_code_are_rejected() -> None:
    with pytest.raises(ValueError, match="cannot be written inside double quotes"):
        tasks.fill('print("<title>")', {"title": 'The "Best" Song'})


def test_evaluations_are_self_contained() -> None:
    for scenario in SCENARIOS.values():
        source = tasks.evaluation_source(scenario)
        names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert {"evaluate", "collateral", "given_answer"} <= names
        texts = tasks.requirements(scenario)
        assert len(set(texts)) == len(texts) >= 2
        assert source.count("with test(") == len(texts)


def test_the_version_is_stable() -> None:
    assert len(build.version()) == 12
    assert build.version() == build.version()


def test_the_task_world_does_not_import_skillsd() -> None:
    """Its scripts run on AppWorld's Python, which doesn't have our dependencies."""
    ours = {path.stem for path in FOLDER.rglob("*.py")}
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] != "skillsd", path
            if isinstance(node, ast.ImportFrom) and node.level and path.parent == FOLDER:
                assert node.module is None or node.module.split(".")[0] in ours | {"scenarios"}


FINGERPRINTS = {
    "train": "d7892d66fbc2e729",
    "dev": "d88dfaf2a572b3ab",
    "test": "0ed2078d7ff248a9",
    "dev_scenario": "bfd39979d74bbe25",
    "test_scenario": "af51655c5bf54481",
}


def test_fingerprints_are_unchanged() -> None:
    """They decide which results are comparable. They cover the tasks' texts, tests and checks.py, comments included.

    Last changed when held-out tasks got texts and parameters of their own (issue 14).
    """
    try:
        task_set = AppWorld(str(paths.world()))
    except UserError as error:
        pytest.skip(str(error))
    assert {split: task_set.fingerprint(split) for split in task_set.splits} == FINGERPRINTS


def run(script: str, *arguments: str, timeout: float = 2000) -> subprocess.CompletedProcess[str]:
    try:
        python = paths.python()
    except UserError as error:
        pytest.skip(str(error))
    command = [str(python), str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.timeout(2100)
def test_the_engine_accepts_only_the_solutions() -> None:
    """A sample of the tasks that ``verify.py`` checks; takes half a minute on an idle core."""
    try:
        root = paths.world()
    except UserError as error:
        pytest.skip(str(error))
    sample = ["songcount_1", "venmobalance_9", "venmototal_11", "likeartist_12", "requestdebt_10", "textcontact_6"]
    result = run("verify.py", "--root", str(root), "--tasks", *sample)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 of 6 tasks pass all checks" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(4200)
def test_builds_a_complete_world_and_verify_finds_a_wrong_task(tmp_path: Path) -> None:
    result = run("build.py", "--root", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # no temporary files
    index = json.loads((tmp_path / "data" / "skillsd.json").read_text())
    assert index["version"] == build.version()
    for split, ids in index["splits"].items():
        assert (tmp_path / "data" / "datasets" / f"{split}.txt").read_text().split() == ids

    answer = tmp_path / "data" / "tasks" / "filecount_2" / "ground_truth" / "answer.json"
    answer.write_text(str(int(answer.read_text()) + 5))
    report = tmp_path / "report.json"
    arguments = ("--tasks", "filecount_1", "filecount_2", "--json", str(report))
    result = run("verify.py", "--root", str(tmp_path), *arguments)
    assert result.returncode == 1
    assert "filecount_2: the solution does not pass" in result.stdout
    findings = json.loads(report.read_text())
    assert not findings["filecount_1"]["failed"]


def test_other_data_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match="did not write"):
        build.put_in_place(tmp_path / "new", tmp_path / "data")
    assert (tmp_path / "new").exists()
