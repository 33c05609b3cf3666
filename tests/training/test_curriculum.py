"""The order in which tasks are trained on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_run import Listener, MakeRun, go

from skillsd.config import CurriculumSection
from skillsd.errors import UserError
from skillsd.training import checkpoint
from skillsd.training.curriculum import Curriculum
from skillsd.training.loop import train
from skillsd.types import Task

sizes = st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(1, 20), st.integers(0, 50)).filter(
    lambda given: given[1] <= given[0]
)


def make(count: int, per_iteration: int, iterations: int, seed: int, **options: Any) -> Curriculum:
    # Difficulties are not sorted, and some are equal.
    tasks = [Task(f"t{i}", "toy", "train", difficulty=float(i * 7 % 11)) for i in range(count)]
    return Curriculum(
        tasks, CurriculumSection(**options), per_iteration=per_iteration, iterations=iterations, seed=seed
    )


def picks(curriculum: Curriculum, iterations: range, visits: Mapping[str, int] | None = None) -> list[list[Task]]:
    """The tasks of several iterations in a row."""
    found = []
    after: Mapping[str, int] = visits or {}
    for iteration in iterations:
        tasks, after = curriculum.pick(iteration, after)
        found.append(tasks)
    return found


@settings(deadline=None)
@given(sizes)
def test_every_task_is_visited_before_any_is_visited_again(given: tuple[int, int, int, int]) -> None:
    count, per_iteration, iterations, _ = given
    visits: Counter[str] = Counter({f"t{i}": 0 for i in range(count)})
    for tasks in picks(make(*given), range(iterations)):
        chosen = [task.id for task in tasks]
        assert len(chosen) == len(set(chosen)) == per_iteration
        visits.update(chosen)
        assert max(visits.values()) - min(visits.values()) <= 1


@settings(deadline=None)
@given(sizes, st.sampled_from([0.25, 0.5, 1.0]))
def test_easy_first_adds_harder_tasks_until_all_are_in(given: tuple[int, int, int, int], full_at: float) -> None:
    count, per_iteration, iterations, _ = given
    curriculum = make(*given, easy_first=True, full_at=full_at)
    difficulties = sorted(float(i * 7 % 11) for i in range(count))
    visits: dict[str, int] = {}
    for iteration in range(iterations):
        before = len(visits)
        tasks, visits = curriculum.pick(iteration, visits)
        assert len({task.id for task in tasks}) == per_iteration
        assert len(visits) >= before  # the pool never shrinks
        assert max(task.difficulty for task in tasks) <= difficulties[len(visits) - 1]
        if iteration == 0:
            assert len(visits) == per_iteration
        if iteration >= full_at * iterations:
            assert len(visits) == count


def test_new_tasks_are_not_repeated_to_catch_up() -> None:
    curriculum = make(20, 2, 40, 0, easy_first=True)
    after: dict[str, int] = {}
    for iteration in range(40):
        before = after
        _, after = curriculum.pick(iteration, before)
        least = min(before.values(), default=0)
        assert all(after[task] in (least, least + 1) for task in after.keys() - before.keys())


@settings(deadline=None)
@given(sizes, st.booleans(), st.data())
def test_pick_is_pure(given: tuple[int, int, int, int], easy_first: bool, data: st.DataObject) -> None:
    """Same arguments, same result; the argument is unchanged; nothing is kept between calls."""
    count, _, iterations, _ = given
    curriculum = make(*given, easy_first=easy_first)
    iteration = data.draw(st.integers(0, iterations - 1))
    visits = data.draw(st.dictionaries(st.sampled_from([f"t{i}" for i in range(count)]), st.integers(0, 9)))
    frozen = dict(visits)
    tasks, after = curriculum.pick(iteration, MappingProxyType(visits))
    assert visits == frozen
    after_before = dict(after)
    curriculum.pick(data.draw(st.integers(0, iterations - 1)), after)
    assert after == after_before
    assert curriculum.pick(iteration, visits) == (tasks, after)
    assert make(*given, easy_first=easy_first).pick(iteration, visits) == (tasks, after)
    grown = Counter(after)
    grown.subtract(visits)
    assert all(grown[task.id] >= 1 for task in tasks)


@settings(deadline=None)
@given(sizes, st.booleans())
def test_resumed_curriculum_picks_the_same(given: tuple[int, int, int, int], easy_first: bool) -> None:
    """With the visits as JSON in between, as in a checkpoint."""
    _, _, iterations, _ = given
    half = iterations // 2
    first, second = make(*given, easy_first=easy_first), make(*given, easy_first=easy_first)
    visits: dict[str, int] = {}
    for iteration in range(half):
        _, visits = first.pick(iteration, visits)
    restored = json.loads(json.dumps(visits))
    expected = picks(first, range(half, iterations), visits)
    assert picks(second, range(half, iterations), restored) == expected


def test_resumed_run_picks_the_same_tasks(make_run: MakeRun) -> None:
    settings = {"curriculum": {"easy_first": True}, "training": {"iterations": 4}}
    expected = [group.task.id for group in go(make_run("whole", **settings)).groups]
    first, before = make_run("parts", **settings), Listener()
    asyncio.run(train(first, before, lambda: first.iteration == 2))
    first.close()
    second, after = make_run("parts", **settings), Listener()

    async def resume() -> None:
        await checkpoint.load(second, checkpoint.find(second.folder))
        assert second.visits == first.visits
        await train(second, after)

    asyncio.run(resume())
    assert [group.task.id for group in before.groups + after.groups] == expected


def test_seeds_give_different_tasks() -> None:
    assert make(20, 5, 4, 0).pick(0, {}) != make(20, 5, 4, 1).pick(0, {})


def test_evaluation_task_is_refused() -> None:
    tasks = [Task("a", "toy", "train"), Task("b", "toy", "tune")]
    with pytest.raises(ValueError, match="evaluation splits"):
        Curriculum(tasks, CurriculumSection(), per_iteration=1, iterations=1, seed=0)


def test_more_tasks_per_iteration_than_tasks_are_refused_by_the_curriculum() -> None:
    with pytest.raises(UserError, match=r"tasks_per_iteration is 3, .* 2 training tasks"):
        make(2, 3, 1, 0)


def test_number_of_tasks_is_limited_evenly(make_run: MakeRun) -> None:
    run = make_run(curriculum={"tasks": 4})
    assert {group.task.id for group in go(run).groups} == {"train-0", "train-2", "train-4", "train-6"}
    with pytest.raises(UserError, match=r"curriculum\.tasks is 8, but the environment has 7"):
        make_run("other", curriculum={"tasks": 8})
