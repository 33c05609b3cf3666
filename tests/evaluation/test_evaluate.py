"""Evaluation: what is counted, and its confidence intervals."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy_env import Toy

from skillsd.engines.base import Engine
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.evaluation.evaluate import Evaluation, evaluate, mean_interval
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.types import Trajectory


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return TorchOptions().build(EngineSpec(str(tiny_model), seed=0, device="cpu"))


def play(engine: Engine, toy: Toy, *, temperature: float = 1.0, **options: Any) -> Evaluation:
    policy = EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens), temperature)
    budget = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)
    return asyncio.run(evaluate(policy, toy, "tune", budget, **({"seed": 0} | options)))


def without_clock(evaluation: Evaluation) -> Evaluation:
    return dataclasses.replace(evaluation, seconds=0.0)


# -- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Wilson's interval without continuity correction; e.g. Newcombe (1998), table I, gives the first three.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_of_shares_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    interval = mean_interval([1.0] * hits + [0.0] * (count - hits))
    assert interval == pytest.approx((low, high), abs=5e-5)


def test_interval_of_other_means_is_students_t() -> None:
    # mean 0.5, standard error 0.1 (n = 5: s^2 = 0.05), t_0.975(4) = 2.776
    values = [0.5 - math.sqrt(0.1), 0.5, 0.5, 0.5, 0.5 + math.sqrt(0.1)]
    assert mean_interval(values) == pytest.approx((0.5 - 0.27764, 0.5 + 0.27764), abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_equal_values_do_not_make_a_narrow_interval(share: float) -> None:
    """24 tasks at .5 once had [.5, .5]: the sample deviation is 0."""
    low, high = mean_interval([share] * 24)
    assert high - low > 0.1
    same = round(share * 24)  # for a share of whole tasks it is the interval of as many successes
    if same / 24 == share:
        assert (low, high) == pytest.approx(mean_interval([1.0] * same + [0.0] * (24 - same)))


def test_wilsons_interval() -> None:
    for successes in (0, 1, 11, 24):
        expected = stats.binomtest(successes, 24).proportion_ci(method="wilson")
        found = mean_interval([1.0] * successes + [0.0] * (24 - successes))
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_contains_its_mean_and_is_within_bounds(values: list[float]) -> None:
    low, high = mean_interval(values)
    assert 0 <= low <= sum(values) / len(values) + 1e-9
    assert sum(values) / len(values) - 1e-9 <= high <= 1


def test_interval_of_no_value_and_of_one_value() -> None:
    assert all(math.isnan(x) for x in mean_interval([]))
    assert mean_interval([0.3]) == (0.0, 1.0)


# -- episodes -------------------------------------------------------------------------------------------------------


def test_every_task_of_the_split_is_played(engine: Engine) -> None:
    played: list[Trajectory] = []
    result = play(engine, Toy(), samples=3, on_episode=played.append)
    assert (result.tasks, result.episodes) == (4, 12)
    assert sorted({t.task.id for t in played}) == ["tune-0", "tune-1", "tune-2", "tune-3"]
    assert result.accuracy == pytest.approx(sum(t.success for t in played) / 12)
    assert result.completion == pytest.approx(sum(t.reward for t in played) / 12)
    assert result.mean_turns == pytest.approx(sum(len(t.turns) for t in played) / 12)
    assert result.fingerprint == Toy().fingerprint("tune")


def test_limit_takes_evenly_spaced_tasks_and_changes_the_fingerprint(engine: Engine) -> None:
    played: list[Trajectory] = []
    result = play(engine, Toy(), limit=2, on_episode=played.append)
    assert {t.task.id for t in played} == {"tune-1", "tune-3"}
    assert result.tasks == 2
    assert result.fingerprint != Toy().fingerprint("tune")


def test_only_sampling_depends_on_the_seed(engine: Engine) -> None:
    def actions(temperature: float, seed: int) -> list[tuple[str, ...]]:
        played: list[Trajectory] = []
        # A deterministic environment, so that only sampling can make a difference.
        play(engine, Deterministic(), temperature=temperature, seed=seed, on_episode=played.append)
        return sorted((t.task.id, *(turn.action for turn in t.turns)) for t in played)

    assert actions(0.0, 1) == actions(0.0, 2)
    assert actions(1.0, 1) == actions(1.0, 1)
    assert actions(1.0, 1) != actions(1.0, 2)


class Deterministic(Toy):
    def make(self) -> Any:
        environment = super().make()
        environment._cell = lambda: "r1c1"  # type: ignore[method-assign]
        return environment


def test_same_seed_gives_the_same_result(engine: Engine) -> None:
    assert without_clock(play(engine, Toy(), samples=2)) == without_clock(play(engine, Toy(), samples=2))


def test_infrastructure_failures_are_left_out(engine: Engine) -> None:
    toy = Toy()

    def fault(at: str, environment: Any) -> None:
        if at == "step" and environment.task.id == "tune-1":
            raise RuntimeError("gone")

    toy.faults = fault
    played: list[Trajectory] = []
    result = play(engine, toy, samples=3, on_episode=played.append)
    kept = [t for t in played if t.task.id != "tune-1"]
    assert len(kept) == len(played) == 9
    assert (result.tasks, result.episodes) == (3, 9)
    assert result.completion == pytest.approx(sum(t.reward for t in kept) / 9)


def test_accuracy_is_nan_if_every_episode_failed(engine: Engine) -> None:
    toy = Toy()
    toy.faults = lambda at, e: (_ for _ in ()).throw(OSError("gone")) if at == "reset" else None
    result = play(engine, toy)
    assert (result.tasks, result.episodes) == (0, 0)
    assert math.isnan(result.accuracy)


def test_context_is_added_to_the_prompt(engine: Engine) -> None:
    played: list[Trajectory] = []
    play(engine, Toy(), context=lambda task: f" Workflow: {task.id}", on_episode=played.append)
    for trajectory in played:
        prompt = engine.tokenizer.decode(trajectory.tokens[: trajectory.prompt_length])
        assert prompt.startswith(f" Workflow: {trajectory.task.id} ")


class Paired(Toy):
    """Two tasks per scenario."""

    def scenario(self, task: Any) -> str:
        return str([other.id for other in self.tasks(task.split)].index(task.id) // 2)


def test_scenario_is_solved_if_all_its_tasks_are(engine: Engine) -> None:
    assert play(engine, Toy()).scenario_accuracy is None
    assert "scenario_accuracy" not in play(engine, Toy()).as_dict()
    found = play(engine, Paired())
    pairs = list(zip(found.successes[::2], found.successes[1::2], strict=True))
    assert 0 < found.accuracy < 1
    assert found.scenario_accuracy == sum(a == b == 1 for a, b in pairs) / len(pairs)
