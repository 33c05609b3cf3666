"""The uplift of skills, measured on a policy whose uplift is known exactly."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from toy_env import Toy, ToyEnvironment

from skillsd.engines.base import Engine, Sample, SampleRequest
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions
from skillsd.evaluation.uplift import Uplift, by_kind, measure_uplift, summarise_uplift
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.skills.bank import HeldOutTaskError, StoredSkill
from skillsd.types import Outcome, Skill, Task

BUDGET = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)


class Scripted(TorchEngine):
    """Plays the workflow in its prompt. Without one, whole episodes of `Left` and `Up` alternate.

    Attributes:
        prompts: workflow ("" without one) -> number of episodes.
        rooms: workflow -> the first request's `max_tokens` of each episode.
    """

    def __init__(self, model: Path) -> None:
        super().__init__(str(model), device="cpu")
        self.prompts: Counter[str] = Counter()
        self.rooms: dict[str, list[int]] = {}
        self._moves: dict[str, str] = {}

    async def sample(self, request: SampleRequest) -> Sample:
        text = self.tokenizer.decode(request.tokens)
        _, found, rest = text.partition("Workflow: ")
        context = rest.split()[0] if found else ""
        session = str(request.session)
        if session not in self._moves:
            self._moves[session] = context or ("Left", "Up")[self.prompts[""] % 2]
            self.prompts[context] += 1
            self.rooms.setdefault(context, []).append(request.max_tokens)
        ids = tuple(self.tokenizer.encode(self._moves[session], add_special_tokens=False))
        assert len(ids) <= request.max_tokens
        return Sample(ids, (0.0,) * len(ids), "length")


@pytest.fixture
def scripted(tiny_model: Path) -> Scripted:
    return Scripted(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return TorchOptions().build(EngineSpec(str(tiny_model), seed=0, device="cpu"))


def policy_of(engine: Engine | Scripted) -> EnginePolicy:
    if isinstance(engine, Scripted):
        engine = Engine(engine, engine, "scripted", TorchOptions.capabilities)
    return EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens))


def measure(
    engine: Engine | Scripted, contexts: list[tuple[Task, str]], toy: Toy | None = None, **options: Any
) -> list[Uplift]:
    settings = {"episodes": 4, "seed": 0} | options
    budget = settings.pop("budget", BUDGET)
    return asyncio.run(measure_uplift(policy_of(engine), toy or Toy(), contexts, budget, **settings))


def train_task(number: int) -> Task:
    return Toy().tasks("train")[number]  # solved by Up, Down, Left, Right in turn; failed by the next move in this list


# -- one skill ------------------------------------------------------------------------------------------------------


def test_uplift_of_a_known_policy(scripted: Scripted) -> None:
    # On train-0 `Up` solves and `Down` fails at once. Without a skill every other episode is `Up` (reward 1), and the
    # others are `Left` to the end (reward 0.5): success 0.5, reward 0.75.
    contexts = [(train_task(0), f" Workflow: {move}") for move in ("Up", "Down", "Left")]
    good, bad, idle = measure(scripted, contexts)
    assert (good.task_id, good.episodes, good.place) == ("train-0", 4, 0)
    assert (good.success_with, good.success_without, good.success) == (1.0, 0.5, 0.5)
    assert (good.reward_with, good.reward_without, good.reward) == (1.0, 0.75, 0.25)
    assert (bad.success, bad.reward) == (-0.5, -0.75)
    assert (idle.success, idle.reward) == (-0.5, -0.25)


def test_plain_prompt_is_played_once_per_task(scripted: Scripted) -> None:
    contexts = [(train_task(n), f" Workflow: {move}") for n in (0, 1) for move in ("Up", "Down", "Up")]
    played: list[Any] = []
    found = measure(scripted, contexts, on_episode=played.append)
    # 4 episodes each: 2 tasks under the plain prompt and with 2 different contexts.
    assert scripted.prompts == {"": 8, "Up": 8, "Down": 8}
    assert len(played) == 24
    assert [uplift.place for uplift in found] == list(range(6))
    assert found[0].reward_with == found[2].reward_with
    assert found[0].reward_without == found[1].reward_without


def test_known_plain_reward_is_not_measured_again(scripted: Scripted) -> None:
    contexts = [(train_task(0), " Workflow: Up"), (train_task(1), " Workflow: Down")]
    first, second = measure(scripted, contexts, plain={"train-0": 0.125})
    assert (first.reward, first.success_with) == (0.875, 1.0)
    assert math.isnan(first.success_without)
    assert math.isnan(first.success)
    assert second.success_without == 0.0  # neither `Left` nor `Up` solves train-1
    assert scripted.prompts[""] == 4
    (figure,) = measure(scripted, [(train_task(0), "")], plain={"train-0": 0.125})
    assert figure.reward_without == 0.125


def test_empty_context_has_no_uplift(engine: Engine) -> None:
    (figure,) = measure(engine, [(train_task(0), "")])
    assert (figure.success, figure.reward) == (0.0, 0.0)


def test_contexts_tokens_do_not_count_against_the_budget(scripted: Scripted) -> None:
    policy = policy_of(scripted)
    prompt = len(policy.renderer.prompt(asyncio.run(Toy().make().reset(train_task(0), 0))))
    tight = Budget(turns=3, turn_tokens=100, trajectory_tokens=prompt + 20)
    context = " Workflow: Up" + " never Down" * 20
    measure(scripted, [(train_task(0), context)], budget=tight)
    assert scripted.rooms == {"": [20] * 4, "Up": [20] * 4}


def test_teacher_as_the_policy(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    sample = Scripted.sample

    async def watch(self: Scripted, request: SampleRequest) -> Sample:
        asked.add(request.weights)
        return await sample(self, request)

    monkeypatch.setattr(Scripted, "sample", watch)
    teacher = dataclasses.replace(policy_of(scripted), weights="teacher")
    contexts = [(train_task(0), " Workflow: Up")]
    [uplift] = asyncio.run(measure_uplift(teacher, Toy(), contexts, BUDGET, episodes=2, seed=0))
    assert uplift.success_with == 1.0
    assert asked == {"teacher"}


@pytest.mark.parametrize(
    "task",
    [
        Toy().tasks("tune")[0],
        Toy(overlap=True).tasks("train")[0],  # its split is `train`, but it is in `tune` too
    ],
)
def test_held_out_tasks_are_refused_before_any_episode(scripted: Scripted, task: Task) -> None:
    toy = Toy(overlap=True)
    with pytest.raises(HeldOutTaskError, match=task.id):
        measure(scripted, [(train_task(1), " Workflow: Up"), (task, " Workflow: Up")], toy)
    assert not toy.made


def test_failed_pairs_are_left_out(scripted: Scripted) -> None:
    toy = Toy()
    failures: Counter[str] = Counter()

    def fault(call: str, environment: ToyEnvironment) -> None:
        if call != "step":
            return
        task = environment.task.id
        # train-1 always fails; train-2 fails once and is played again.
        if task == "train-1" or (task == "train-2" and not failures[task]):
            failures[task] += 1
            raise RuntimeError("gone")

    toy.faults = fault
    found = measure(scripted, [(train_task(n), " Workflow: Left") for n in (0, 1, 2)], toy)
    assert [(f.place, f.task_id) for f in found] == [(0, "train-0"), (2, "train-2")]
    assert found[1].success_with == 1.0
    assert failures["train-2"] == 1


def test_pair_is_left_out_if_either_side_failed(scripted: Scripted) -> None:
    toy = Toy()

    def fault(call: str, environment: ToyEnvironment) -> None:
        if call == "step" and environment.actions[-1] == "Down":
            raise RuntimeError("gone")

    toy.faults = fault
    contexts = [(train_task(0), " Workflow: Down"), (train_task(0), " Workflow: Up")]
    assert [figure.place for figure in measure(scripted, contexts, toy)] == [1]


def test_engine_failure_is_raised_unchanged(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sample(self: Scripted, request: SampleRequest) -> Sample:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Scripted, "sample", sample)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(scripted, [(train_task(0), " Workflow: Up")])


def test_result_does_not_depend_on_the_other_pairs(engine: Engine) -> None:
    contexts = [(train_task(n), f" Workflow: {move}") for n in (0, 1, 2) for move in ("Up", "Down")]
    together = measure(engine, contexts, episodes=8)
    alone = measure(engine, contexts[3:4], episodes=8, concurrency=3)
    assert (alone[0].reward_with, alone[0].reward_without) == (together[3].reward_with, together[3].reward_without)
    assert measure(engine, contexts, episodes=8) == together
    assert measure(engine, contexts, episodes=8, seed=1) != together


# -- many skills ----------------------------------------------------------------------------------------------------


def stored(number: int, task: str, skill: Skill, outcome: Outcome = Outcome.SOLVED) -> StoredSkill:
    return StoredSkill(number, "toy", task, skill, "", 1, 1.0, outcome, 1, 0, 0.0)


def uplift(task: str, with_skill: float, without: float) -> Uplift:
    return Uplift(0, task, with_skill, without, with_skill, without, 4)


def test_tasks_have_equal_weight_and_are_the_unit_of_the_interval() -> None:
    # Three skills of a, one of b and one of c: the tasks' uplifts are 0.5, -0.25 and 0.
    figures = summarise_uplift(
        [
            (stored(1, "a", Skill("", "", "x")), uplift("a", 1.0, 0.25)),
            (stored(2, "a", Skill("", "", "y")), uplift("a", 0.75, 0.25)),
            (stored(3, "a", Skill("", "", "z")), uplift("a", 0.5, 0.25)),
            (stored(4, "b", Skill("", "", "x")), uplift("b", 0.5, 0.75)),
            (stored(5, "c", Skill("", "", "x")), uplift("c", 0.5, 0.5)),
        ]
    )
    assert (figures.skills, figures.tasks) == (5, 3)
    assert figures.with_skill == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert figures.without_skill == pytest.approx((0.25 + 0.75 + 0.5) / 3)
    assert figures.success == pytest.approx(0.25 / 3)
    low, high = stats.t.interval(0.95, 2, 0.25 / 3, stats.sem([0.5, -0.25, 0.0]))
    assert high > 1
    assert figures.success_interval == pytest.approx((low, 1.0))
    assert (figures.better, figures.worse) == (0.6, 0.2)


def test_interval_is_within_bounds() -> None:
    figures = summarise_uplift([(stored(1, "a", Skill("", "", "x")), uplift("a", 1.0, 0.0))])
    assert figures.success == 1.0
    assert -1 <= figures.success_interval[0] <= figures.success_interval[1] <= 1


def test_kinds_of_skills() -> None:
    kinds = by_kind(
        [
            (stored(1, "a", Skill("", "", "go")), uplift("a", 1, 0)),
            (stored(2, "a", Skill("well", "not so", "go")), uplift("a", 1, 0)),
            (stored(3, "a", Skill("", "not so", ""), Outcome.FAILED), uplift("a", 1, 0)),
            (stored(4, "a", Skill("well", "", ""), Outcome.TRUNCATED_TURNS), uplift("a", 1, 0)),
        ]
    )
    assert {kind: [skill.id for skill, _ in pairs] for kind, pairs in kinds.items()} == {
        "from failed": [3],
        "from solved": [1, 2],
        "from truncated_turns": [4],
        "mistake only": [3],
        "neither workflow nor mistake": [4],
        "workflow and mistake": [2],
        "workflow only": [1],
    }
