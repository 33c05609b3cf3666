"""Writes our own task world in AppWorld's format: ``python build.py --root ROOT [--workers N]``.

Run by AppWorld's Python. All randomness has fixed seeds, so every build has the same content. The data are built in a
temporary folder and renamed at the end, so that ``ROOT/data`` is either complete or absent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tasks import TaskSpec

NAME = "skillsd task world"
_HERE = Path(__file__).resolve().parent
# Sources that don't affect the data, and so not the version.
_NOT_BUILDING = {"verify.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder to write data/ into")
    parser.add_argument("--workers", type=int, default=1, help="number of processes that write task databases")
    arguments = parser.parse_args()
    sys.path.append(str(_HERE.parent))
    build(arguments.root.resolve(), arguments.workers)


def build(root: Path, workers: int) -> None:
    from world.episode import Clock, fork_each, preload
    from world.lives import make_world
    from world.tasks import make_tasks

    clock = Clock()
    root.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    os.environ["APPWORLD_ROOT"] = str(stage)
    try:
        world = make_world()
        tasks = make_tasks(world)
        say(f"{len(world.people)} people, {len(tasks)} tasks; writing API documentation and base databases")
        [(_, outcome)] = fork_each([("base", lambda: write_foundation(world, stage / "data"))], 1)
        check("the base databases", outcome)
        say(f"[{clock}] base databases are written; writing the tasks")
        preload()
        first = {task.scenario.id: task for task in reversed(tasks)}
        run_each("writing", first.values(), lambda task: write_tasks([task], {}), workers)
        played = run_each("playing", first.values(), no_op_labels, workers)
        labels = {key.split("_")[0]: outcome for key, outcome in played.items()}
        say(f"[{clock}] a no-op has been played in each of {len(first)} scenarios")
        batches = [tasks[start::workers] for start in range(workers)]
        jobs = [
            (f"batch {number}", lambda batch=batch: write_tasks(batch, labels)) for number, batch in enumerate(batches)
        ]
        for key, outcome in fork_each(jobs, workers):
            check(key, outcome)
        write_index(tasks, stage / "data")
        put_in_place(stage / "data", root / "data")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    say(f"[{clock}] {root / 'data'} is complete, version {version()}")


def run_each(what: str, tasks: Iterable[TaskSpec], job: Callable[[TaskSpec], Any], workers: int) -> dict[str, Any]:
    """Run a job for each task, each in its own process. Returns the outcomes by task id."""
    from world.episode import fork_each

    outcomes = dict(fork_each([(task.id, lambda task=task: job(task)) for task in tasks], workers))
    for key, outcome in outcomes.items():
        check(f"{what} {key}", outcome)
    return outcomes


def say(text: str) -> None:
    print(text, flush=True)


def check(what: str, outcome: Any) -> None:
    if isinstance(outcome, dict) and "error" in outcome:
        raise SystemExit(f"building {what} failed:\n{outcome['error']}")


def version() -> str:
    """Hash of the sources that determine the data."""
    digest = hashlib.sha256()
    for path in sorted(_HERE.rglob("*.py")):
        if path.name not in _NOT_BUILDING:
            digest.update(f"{path.relative_to(_HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write_foundation(world: Any, data: Path) -> None:
    """Write what all tasks share: the version, the API documentation and the base databases."""
    from appworld.apps import get_all_apps
    from appworld.apps.api_lib import set_local_date_and_time
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.common.constants import CANARY_STRING, DB_VERSION
    from world.database import NOW, write_base

    write_text(data / "version.txt", DB_VERSION)
    api_docs = ApiDocCollection.build(load_apps=tuple(get_all_apps(skip_admin=True)))
    for app, docs in api_docs.items():
        marked = {name: {**doc, "canary_string": CANARY_STRING} for name, doc in docs.items()}
        write_json(data / "api_docs" / "standard" / f"{app}.json", marked)
    set_local_date_and_time(NOW)
    write_base(world, data / "base_dbs", api_docs)


def write_tasks(tasks: list[TaskSpec], labels: dict[str, dict[str, str]]) -> None:
    """Write task folders. ``labels``: scenario id -> label of each test, for those already known."""
    from appworld.apps.api_lib import set_local_date_and_time
    from world.database import NOW

    set_local_date_and_time(NOW)
    for task in tasks:
        write_databases(task)
        write_ground_truth(task, labels.get(task.scenario.id, {}))


def write_databases(task: TaskSpec) -> None:
    """Write the task's changes to the base databases: the supervisor record, which differs per task."""
    from appworld.apps import get_all_apps
    from appworld.collections.models import ModelCollection
    from appworld.common.constants import DB_VERSION
    from appworld.common.path_store import path_store
    from appworld.task import Task
    from world.database import NOW

    person = task.supervisor
    models = ModelCollection.load(
        from_db_home_path=os.path.join(path_store.data, "base_dbs"),
        to_db_home_path=f":memory:task_input-{task.id}",
        load_apps=get_all_apps(),
    )
    supervisor = models.supervisor.Supervisor.create_save(
        first_name=person.first_name,
        last_name=person.last_name,
        email=person.email,
        phone_number=person.phone_number,
        birthday=person.birthday,
        sex=person.sex,
    )
    models.supervisor.Task.create_save(supervisor_id=supervisor.id, instruction=task.instruction)
    for app, password in person.passwords.items():
        models.supervisor.AccountPassword.create_save(supervisor_id=supervisor.id, account_name=app, password=password)
    folder = Path(path_store.data) / "tasks" / task.id
    shutil.rmtree(folder, ignore_errors=True)
    Task(
        id=task.id,
        instruction=task.instruction,
        supervisor=supervisor,
        datetime=NOW,
        allowed_apps=get_all_apps(skip_admin=True),
        db_version=DB_VERSION,
        model_collection=models,
    ).save(save_ground_truth=False, model_collection_format="changes")
    models.close()


def write_ground_truth(task: TaskSpec, labels: dict[str, str]) -> None:
    """Write the evaluation with its data, and the reference solution. Unknown labels become "no_op_fail"."""
    from appworld.common.path_store import path_store
    from world.tasks import evaluation_source, requirements

    truth = Path(path_store.data) / "tasks" / task.id / "ground_truth"
    codes = [turn["code"] for turn in task.solution]
    metadata = {
        "mode": "minimal",
        "difficulty": task.scenario.difficulty,
        "num_apps": len(task.scenario.apps),
        "num_apis": len({word for code in codes for word in code.split() if "apis." in word}),
        "num_api_calls": sum(code.count("apis.") for code in codes),
        "num_solution_code_lines": sum(len(code.splitlines()) for code in codes),
    }
    write_json(truth / "metadata.json", metadata)
    write_json(truth / "required_apps.json", list(task.scenario.apps))
    write_json(truth / "public_data.json", task.parameters)
    write_json(truth / "private_data.json", task.expected)
    write_json(truth / "answer.json", task.answer)
    tests = [{"requirement": text, "label": labels.get(text, "no_op_fail")} for text in requirements(task.scenario)]
    write_json(truth / "test_data.json", tests)
    write_json(truth / "solution.json", task.solution)
    write_text(truth / "solution.py", "\n".join(codes) + "\n")
    write_text(truth / "evaluation.py", evaluation_source(task.scenario))


def no_op_labels(task: TaskSpec) -> dict[str, str]:
    """Label the tests by whether a no-op passes them (the agent only completes the task). Those earn no reward."""
    from world.episode import play
    from world.scenarios.base import FINISH

    result = play(task.id, [FINISH])
    labels = {test["requirement"]: "no_op_pass" for test in result["passes"]}
    return labels | {test["requirement"]: "no_op_fail" for test in result["failures"]}


def write_index(tasks: list[TaskSpec], data: Path) -> None:
    """Write the splits: lists of ids for the engine, and an index with facts about each task for skillsd."""
    from world.tasks import SPLITS

    splits = {split: [task.id for task in tasks if task.split == split] for split in SPLITS}
    for split, ids in splits.items():
        write_text(data / "datasets" / f"{split}.txt", "\n".join(ids) + "\n")
    index = {
        task.id: {
            "scenario": task.scenario.id,
            "difficulty": task.scenario.difficulty,
            "apps": list(task.scenario.apps),
            "turns": len(task.solution),
        }
        for task in tasks
    }
    write_json(data / "skillsd.json", {"name": NAME, "version": version(), "splits": splits, "tasks": index})


def put_in_place(new: Path, place: Path) -> None:
    """Rename the finished data into place. Replaces data written by this script, but no other data."""
    if place.exists():
        if not (place / "skillsd.json").exists():
            raise SystemExit(f"{place} has data that this script did not write (official data?): not replaced")
        old = new.parent / "old"
        place.rename(old)
    new.rename(place)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main()
