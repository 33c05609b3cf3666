"""Evaluation: what is counted, and how sure one can be."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_env import Toy

from skillsd.engines.torch.engine import TorchEngine
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.prompting.renderer import ChatRenderer
from skillsd.evaluation.evaluate import Evaluation, evaluate, mean_interval
from skillsd.types import Trajectory


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TorchEngine:
    return TorchEngine(str(tiny_model), device="cpu")


def play(engine: TorchEngine, toy: Toy, *, temperature: float = 1.0, **options: Any) -> Evaluation:
    actor = EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens), temperature)
    budget = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)
    return asyncio.run(evaluate(actor, toy, "tune", budget, **({"seed": 0} | options)))


def still(evaluation: Evaluation) -> Evaluation:
    return dataclasses.replace(evaluation, seconds=0.0)


# -- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Wilson's interval without continuity correction; e.g. Newcombe (1998), table I, gives the first three.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    interval = mean_interval([1.0] * hits + [0.0] * (count - hits))
    assert interval == pytest.approx((low, high), abs=5e-5)


def test_other_means_have_students() -> None:
    # mean 0.5, standard error 0.1 (n = 5: s^2 = 0.05), t_0.975(4) = 2.776
    values = [0.5 - math.sqrt(0.1), 0.5, 0.5, 0.5, 0.5 + math.sqrt(0.1)]
    assert mean_interval(values) == pytest.approx((0.5 - 0.27764, 0.5 + 0.27764), abs=1e-4)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_stays_in_bounds(values: list[float]) -> None:
    low, high = mean_interval(values)
    assert 0 <= low <= sum(values) / len(values) + 1e-9
    assert sum(values) / len(values) - 1e-9 <= high <= 1


def test_nothing_says_nothing_and_one_value_little() -> None:
    assert all(math.isnan(x) for x in mean_interval([]))
    assert mean_interval([0.3]) == (0.0, 1.0)


# -- episodes -------------------------------------------------------------------------------------------------------


def test_every_task_of_the_split_is_played_as_often_as_asked(engine: TorchEngine) -> None:
    played: list[Trajectory] = []
    figures = play(engine, Toy(), samples=3, on_episode=played.append)
    assert (figures.tasks, figures.episodes) == (4, 12)
    assert sorted({t.task.id for t in played}) == ["tune-0", "tune-1", "tune-2", "tune-3"]
    assert figures.accuracy == pytest.approx(sum(t.success for t in played) / 12)
    assert figures.completion == pytest.approx(sum(t.reward for t in played) / 12)
    assert figures.mean_turns == pytest.approx(sum(len(t.turns) for t in played) / 12)
    assert figures.fingerprint == Toy().fingerprint("tune")


def test_a_limit_is_tasks_evenly_spread_and_another_panel(engine: TorchEngine) -> None:
    played: list[Trajectory] = []
    figures = play(engine, Toy(), limit=2, on_episode=played.append)
    assert {t.task.id for t in played} == {"tune-1", "tune-3"}
    assert figures.tasks == 2
    assert figures.fingerprint != Toy().fingerprint("tune")


def test_greedy_does_not_depend_on_the_seed_and_sampled_does(engine: TorchEngine) -> None:
    def said(temperature: float, seed: int) -> list[tuple[str, ...]]:
        played: list[Trajectory] = []
        # Environments without chance: only what is sampled may differ.
        play(engine, Fixed(), temperature=temperature, seed=seed, on_episode=played.append)
        return sorted((t.task.id, *(turn.action for turn in t.turns)) for t in played)

    assert said(0.0, 1) == said(0.0, 2)
    assert said(1.0, 1) == said(1.0, 1)
    assert said(1.0, 1) != said(1.0, 2)


class Fixed(Toy):
    def make(self) -> Any:
        environment = super().make()
        environment._cell = lambda: "r1c1"  # type: ignore[method-assign]
        return environment


def test_the_same_seed_gives_the_same_figures(engine: TorchEngine) -> None:
    assert still(play(engine, Toy(), samples=2)) == still(play(engine, Toy(), samples=2))


def test_broken_episodes_are_left_out_not_counted_as_failures(engine: TorchEngine) -> None:
    toy = Toy()

    def fault(at: str, environment: Any) -> None:
        if at == "step" and environment.task.id == "tune-1":
            raise RuntimeError("gone")

    toy.faults = fault
    played: list[Trajectory] = []
    figures = play(engine, toy, samples=3, on_episode=played.append)
    kept = [t for t in played if t.task.id != "tune-1"]
    assert len(kept) == len(played) == 9
    assert (figures.tasks, figures.episodes) == (3, 9)
    assert figures.completion == pytest.approx(sum(t.reward for t in kept) / 9)


def test_everything_broken_is_no_figure_at_all(engine: TorchEngine) -> None:
    toy = Toy()
    toy.faults = lambda at, e: (_ for _ in ()).throw(OSError("gone")) if at == "reset" else None
    figures = play(engine, toy)
    assert (figures.tasks, figures.episodes) == (0, 0)
    assert math.isnan(figures.accuracy)


def test_a_context_is_told_only_where_it_is_asked_for(engine: TorchEngine) -> None:
    played: list[Trajectory] = []
    play(engine, Toy(), context=lambda task: f" Workflow: {task.id}", on_episode=played.append)
    for trajectory in played:
        prompt = engine.tokenizer.decode(trajectory.tokens[: trajectory.prompt_length])
        assert prompt.endswith(f"Workflow: {trajectory.task.id}")


class Paired(Toy):
    """Two tasks of each scenario."""

    def scenario(self, task: Any) -> str:
        return str([other.id for other in self.tasks(task.split)].index(task.id) // 2)


def test_a_scenario_is_solved_when_all_its_tasks_are(engine: TorchEngine) -> None:
    assert play(engine, Toy()).scenario_accuracy is None
    assert "scenario_accuracy" not in play(engine, Toy()).as_dict()
    found = play(engine, Paired())
    pairs = list(zip(found.successes[::2], found.successes[1::2], strict=True))
    assert 0 < found.accuracy < 1
    assert found.scenario_accuracy == sum(a == b == 1 for a, b in pairs) / len(pairs)
