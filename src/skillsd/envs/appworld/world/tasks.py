"""The tasks: assigns a supervisor, a split and parameters to each instance of each scenario."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lives import World
from .people import Person
from .scenarios import SCENARIOS, Scenario

INSTANCES = 12
MAX_DRAWS = 1000
"""Attempts at unused parameters for a task."""
SPLITS = ("train", "dev", "test", "dev_scenario", "test_scenario")
# The 12 instances of a training scenario: 1 to 8 for training, then two each for dev and test.
_INSTANCE_SPLITS = ("train",) * 8 + ("dev",) * 2 + ("test",) * 2
_SHARED_PARAMETERS = {"direction", "relation"}
"""Parameters with a few fixed values, which all splits use. Of the others, held-out tasks have values of their own."""


@dataclass(frozen=True)
class TaskSpec:
    """One task, without its databases; ``solution`` is the reference solution, turn by turn."""

    id: str
    scenario: Scenario
    split: str
    supervisor: Person
    instruction: str
    parameters: dict[str, Any]
    expected: dict[str, Any]
    answer: Any
    solution: list[dict[str, str]]


def make_tasks(world: World) -> list[TaskSpec]:
    """All tasks, scenario by scenario.

    No two tasks of a scenario share supervisor and parameters, and no two splits of it share a parameter's value
    (except `_SHARED_PARAMETERS`).

    Raises:
        ValueError: if a scenario has too few values for that, or `problems_of_splits` finds a shared text.
    """
    tasks: list[TaskSpec] = []
    for position, scenario in enumerate(SCENARIOS.values()):
        made: list[TaskSpec] = []
        for number in range(1, INSTANCES + 1):
            split, person = _place(world, scenario, position, number)
            made.append(_make_task(world, scenario, split, person, number, made))
        tasks += made
    if problems := problems_of_splits((spec.id, spec.split, spec.instruction, spec.solution) for spec in tasks):
        raise ValueError("; ".join(problems))
    return tasks


def problems_of_splits(tasks: Iterable[tuple[str, str, str, list[dict[str, str]]]]) -> list[str]:
    """What two splits share: instructions or reference solutions, as sentences; empty if they share nothing.

    Args:
        tasks: id, split, instruction and solution of each task.
    """
    first: dict[tuple[str, str], tuple[str, str]] = {}
    problems = []
    for task_id, split, instruction, solution in tasks:
        texts = {"instruction": instruction, "reference solution": "\n".join(turn["code"] for turn in solution)}
        for kind, text in texts.items():
            other_id, other_split = first.setdefault((kind, text), (task_id, split))
            if other_split != split:
                problems.append(f"{task_id} ({split}) has the {kind} of {other_id} ({other_split})")
    return problems


def _place(world: World, scenario: Scenario, position: int, number: int) -> tuple[str, Person]:
    """The split of an instance and its supervisor, taken in rotation from the split's pool of people."""
    split = _INSTANCE_SPLITS[number - 1] if scenario.kind == "train" else f"{scenario.kind}_scenario"
    pool = world.pool(split.removesuffix("_scenario"))
    # Steps coprime to the pool sizes (18 and 6), so that scenarios use different people in different orders.
    return split, pool[(5 * position + 7 * number) % len(pool)]


def _make_task(
    world: World, scenario: Scenario, split: str, person: Person, number: int, made: list[TaskSpec]
) -> TaskSpec:
    rng = random.Random(f"task/{scenario.id}/{number}")
    taken = [spec.parameters for spec in made if spec.supervisor == person]
    elsewhere = {value for spec in made if spec.split != split for value in _own_values(spec.parameters)}
    for _ in range(MAX_DRAWS):
        draw = scenario.draw(world, person, rng)
        if draw.parameters not in taken and not elsewhere.intersection(_own_values(draw.parameters)):
            break
    else:
        raise ValueError(f"{scenario.id}_{number}: no unused parameters left for {person.name} in {split}")
    instruction = scenario.instructions[(number - 1) % len(scenario.instructions)]
    return TaskSpec(
        id=f"{scenario.id}_{number}",
        scenario=scenario,
        split=split,
        supervisor=person,
        instruction=fill(instruction, draw.parameters),
        parameters=draw.parameters,
        expected=draw.expected,
        answer=draw.answer,
        solution=[{"thought": turn.thought, "code": fill(turn.code, draw.parameters)} for turn in scenario.turns],
    )


def _own_values(parameters: dict[str, Any]) -> set[tuple[str, Any]]:
    return {item for item in parameters.items() if item[0] not in _SHARED_PARAMETERS}


def fill(text: str, parameters: dict[str, Any]) -> str:
    """Replace each ``<name>`` with its parameter. Values go inside double quotes in code, so they can't contain any."""
    for name, value in parameters.items():
        if '"' in str(value) or "\\" in str(value):
            raise ValueError(f"the parameter {name}={value!r} cannot be written inside double quotes")
        text = text.replace(f"<{name}>", str(value))
    return text


def evaluation_source(scenario: Scenario) -> str:
    """The text of a task's evaluation.py: checks.py, then the scenario's tests as the function ``evaluate``."""
    helpers = (Path(__file__).parent / "checks.py").read_text()
    tests = inspect.getsource(scenario.evaluate).replace("  # noqa: F821", "")
    tests = re.sub(r"^def \w+\(", "def evaluate(", tests)
    return f"{helpers}\n\n{tests}"


def requirements(scenario: Scenario) -> list[str]:
    """The requirement texts of a scenario's tests, in order."""
    return re.findall(r'with test\("([^"]+)"\)', inspect.getsource(scenario.evaluate))
