"""Which tasks come when."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_run import MakeRun, go

from skillsd.config import CurriculumSection
from skillsd.errors import UserError
from skillsd.training.curriculum import Curriculum
from skillsd.types import Task

sizes = st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(1, 20), st.integers(0, 50)).filter(
    lambda given: given[1] <= given[0]
)


def make(count: int, per_iteration: int, iterations: int, seed: int, **options: Any) -> Curriculum:
    # Difficulties come in no order, and some are equal.
    tasks = [Task(f"t{i}", "toy", "train", difficulty=float(i * 7 % 11)) for i in range(count)]
    return Curriculum(
        tasks, CurriculumSection(**options), per_iteration=per_iteration, iterations=iterations, seed=seed
    )


@settings(deadline=None)
@given(sizes)
def test_every_task_is_visited_before_any_is_visited_again(given: tuple[int, int, int, int]) -> None:
    count, per_iteration, iterations, _ = given
    curriculum = make(*given)
    visits: Counter[str] = Counter({f"t{i}": 0 for i in range(count)})
    for iteration in range(iterations):
        chosen = [task.id for task in curriculum.pick(iteration)]
        assert len(chosen) == len(set(chosen)) == per_iteration
        visits.update(chosen)
        assert max(visits.values()) - min(visits.values()) <= 1


@settings(deadline=None)
@given(sizes, st.sampled_from([0.25, 0.5, 1.0]))
def test_easy_first_lets_the_harder_ones_in_until_all_are(given: tuple[int, int, int, int], full_at: float) -> None:
    count, per_iteration, iterations, _ = given
    curriculum = make(*given, easy_first=True, full_at=full_at)
    easiest_first = sorted(float(i * 7 % 11) for i in range(count))
    seen = 0
    for iteration in range(iterations):
        chosen = curriculum.pick(iteration)
        assert len({task.id for task in chosen}) == per_iteration
        known = len(curriculum.state())
        assert known >= seen  # nobody is put out again
        seen = known
        assert max(task.difficulty for task in chosen) <= easiest_first[known - 1]
        if iteration == 0:
            assert known == per_iteration
        if iteration >= full_at * iterations:
            assert known == count


def test_newcomers_are_not_drilled_to_catch_up() -> None:
    curriculum = make(20, 2, 40, 0, easy_first=True)
    for iteration in range(40):
        before = dict(curriculum.state())
        curriculum.pick(iteration)
        after = curriculum.state()
        least = min(before.values(), default=0)
        assert all(after[task] in (least, least + 1) for task in after.keys() - before.keys())


@settings(deadline=None)
@given(sizes, st.booleans())
def test_a_restored_curriculum_goes_on_as_the_first_one_would(
    given: tuple[int, int, int, int], easy_first: bool
) -> None:
    _, _, iterations, _ = given
    whole = make(*given, easy_first=easy_first)
    expected = [whole.pick(i) for i in range(iterations)]
    first, second = make(*given, easy_first=easy_first), make(*given, easy_first=easy_first)
    half = iterations // 2
    found = [first.pick(i) for i in range(half)]
    second.restore(first.state())
    assert found + [second.pick(i) for i in range(half, iterations)] == expected
    assert second.state() == whole.state()


def test_seeds_differ() -> None:
    assert make(20, 5, 4, 0).pick(0) != make(20, 5, 4, 1).pick(0)


def test_an_evaluation_task_is_refused() -> None:
    tasks = [Task("a", "toy", "train"), Task("b", "toy", "tune")]
    with pytest.raises(ValueError, match="evaluation splits"):
        Curriculum(tasks, CurriculumSection(), per_iteration=1, iterations=1, seed=0)


def test_more_tasks_an_iteration_than_there_are() -> None:
    with pytest.raises(UserError, match=r"tasks_per_iteration is 3, .* 2 training tasks"):
        make(2, 3, 1, 0)


def test_so_many_tasks_are_trained_on_evenly_spread(make_run: MakeRun) -> None:
    run = make_run(curriculum={"tasks": 4})
    assert {group.task.id for group in go(run).groups} == {"train-0", "train-2", "train-4", "train-6"}
    with pytest.raises(UserError, match=r"curriculum\.tasks is 8, but the environment has 7"):
        make_run("other", curriculum={"tasks": 8})
