"""One episode: its outcomes, its tokens, and what it leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_env import Toy, ToyEnvironment
from transformers import AutoTokenizer

from skillsd.engines.base import Engine, Sample, SampleRequest
from skillsd.envs.base import Step
from skillsd.rollouts.collect import Collected, collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.episode import run_episode
from skillsd.rollouts.policy import Budget
from skillsd.prompting.renderer import ChatRenderer
from skillsd.types import Outcome, Task, Trajectory

BUDGET = Budget(turns=3, turn_tokens=2, trajectory_tokens=40, step_seconds=5.0)


class ScriptedEngine(Engine):
    """Says what it is told to; remembers what it was asked."""

    def __init__(self, tokenizer: Any, say: Callable[[SampleRequest], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.stop_tokens = frozenset(self.ids(f" {m}")[0] for m in ("Up", "Down", "Left", "Right"))
        self.max_length = 256
        self.requests: list[SampleRequest] = []
        self.ended: list[str] = []
        self.latency: Callable[[SampleRequest], float] = lambda request: 0.0

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def sample(self, request: SampleRequest) -> Sample:
        self.requests.append(request)
        await asyncio.sleep(self.latency(request))
        ids = tuple(self.ids(f" {self.say(request)}")[: request.max_tokens])
        logprobs = tuple(-0.5 - i - request.seed % 7 for i in range(len(ids)))
        return Sample(ids, logprobs, "stop" if ids[-1] in self.stop_tokens else "length")

    def end_session(self, session: str) -> None:
        self.ended.append(session)

    def score(self, *args: Any, **options: Any) -> Any: ...
    def forward_backward(self, *args: Any, **options: Any) -> Any: ...
    def step(self, *args: Any) -> Any: ...
    def sync_teacher(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def engine(tokenizer: Any) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, lambda request: "Right")


def actor(engine: ScriptedEngine) -> EnginePolicy:
    return EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens))


def play(
    engine: ScriptedEngine, toy: Toy, target: str = "Up", loses: str = "Down", budget: Budget = BUDGET, **options: Any
) -> Trajectory:
    task = Task("t", "toy", "train", {"target": target, "loses": loses})
    seeds = {"seed": 1, "environment_seed": 2, "session": "s", **options}
    return asyncio.run(run_episode(actor(engine), toy.make(), task, budget, **seeds))


def fail_at(call: str, error: Callable[[], BaseException]) -> Callable[[str, ToyEnvironment], None]:
    def fault(at: str, environment: ToyEnvironment) -> None:
        if at == call:
            raise error()

    return fault


# -- outcomes -------------------------------------------------------------------------------------------------------


def test_solved_and_failed(engine: ScriptedEngine) -> None:
    solved = play(engine, Toy(), target="Right")
    assert (solved.outcome, solved.reward, solved.success, len(solved.turns)) == (Outcome.SOLVED, 1.0, True, 1)
    failed = play(engine, Toy(), loses="Right")
    assert (failed.outcome, failed.reward, failed.success, len(failed.turns)) == (Outcome.FAILED, 0.5, False, 1)


def test_out_of_turns(engine: ScriptedEngine) -> None:
    trajectory = play(engine, Toy())
    assert trajectory.outcome is Outcome.TRUNCATED_TURNS
    assert (len(trajectory.turns), trajectory.reward) == (3, 0.5)
    assert trajectory.outcome.has_reward


@pytest.mark.parametrize("limit", range(1, 16))
def test_out_of_tokens_never_beyond_the_budget(engine: ScriptedEngine, limit: int) -> None:
    # A tokenizer of words: prompt 3 tokens, a move 1, an observation 1.
    trajectory = play(engine, Toy(turns=5), budget=Budget(5, 2, limit))
    assert len(trajectory.tokens) <= max(limit, trajectory.prompt_length)
    # The last one of the trajectory's tokens is the student's: no one reads an observation after it.
    assert not trajectory.turns or trajectory.action_mask[-1]
    complete = len(play(engine, Toy(turns=5), budget=Budget(5, 2, 1000)).tokens)
    expected = Outcome.TRUNCATED_TOKENS if limit < complete else Outcome.TRUNCATED_TURNS
    assert trajectory.outcome is expected


def test_a_turn_may_use_no_more_than_is_left(tokenizer: Any) -> None:
    engine = ScriptedEngine(tokenizer, lambda request: "Sokoban: Sokoban: Up")
    trajectory = play(engine, Toy(), budget=Budget(3, 3, 5))
    assert engine.requests[0].max_tokens == 5 - trajectory.prompt_length
    assert play(engine, Toy(), budget=Budget(3, 3, 40)).outcome is not None
    assert engine.requests[1].max_tokens == 3


@pytest.mark.parametrize("call", ["reset", "step"])
@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("the simulator is gone"),
        lambda: TimeoutError("its own"),
        lambda: asyncio.CancelledError(),
        lambda: ValueError(),
    ],
)
def test_an_environment_that_raises(engine: ScriptedEngine, call: str, error: Callable[[], BaseException]) -> None:
    toy = Toy()
    toy.faults = fail_at(call, error)
    trajectory = play(engine, toy)
    assert trajectory.outcome is Outcome.ENV_ERROR
    assert not trajectory.outcome.has_reward
    assert call in trajectory.error
    assert "longer than" not in trajectory.error  # it did not take too long, whatever it says
    assert engine.ended == (["s"] if call == "step" else [])  # nothing has begun before the prompt
    assert toy.made[0].closed == 1


@pytest.mark.parametrize("call", ["reset", "step"])
def test_an_environment_that_hangs(engine: ScriptedEngine, call: str) -> None:
    toy = Toy()
    toy.faults = lambda at, environment: asyncio.sleep(60) if at == call else None
    trajectory = play(engine, toy, budget=dataclasses.replace(BUDGET, step_seconds=0.05))
    assert trajectory.outcome is Outcome.TIMEOUT
    assert trajectory.error.startswith(call)
    assert "0.05 s" in trajectory.error
    assert engine.ended == (["s"] if call == "step" else [])  # nothing has begun before the prompt
    assert toy.made[0].closed == 1


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_an_environment_that_cannot_be_closed_has_had_its_episode(engine: ScriptedEngine, how: str) -> None:
    toy = Toy()
    if how == "raises":
        toy.faults = fail_at("close", lambda: RuntimeError("stuck"))
    else:
        toy.faults = lambda at, environment: asyncio.sleep(60) if at == "close" else None
    trajectory = play(engine, toy, target="Right", budget=dataclasses.replace(BUDGET, step_seconds=0.05))
    assert (trajectory.outcome, trajectory.error) == (Outcome.SOLVED, "")


@pytest.mark.parametrize(
    "answer", [None, Step("x", False, float("nan"), False), Step("x", False, 1.5, False), Step("x", True, -0.1, False)]
)
def test_an_answer_that_cannot_be_trained_on_is_an_error_of_the_environment(
    engine: ScriptedEngine, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def step(self: ToyEnvironment, action: str) -> Any:
        return answer

    monkeypatch.setattr(ToyEnvironment, "step", step)
    assert play(engine, Toy()).outcome is Outcome.ENV_ERROR


# -- tokens ---------------------------------------------------------------------------------------------------------


def test_the_running_prefix_never_changes_and_samples_stay_verbatim(tokenizer: Any) -> None:
    words = iter(["Left Left", "Sokoban: Workflow:", "Right"])
    engine = ScriptedEngine(tokenizer, lambda request: next(words))
    trajectory = play(engine, Toy(), target="", loses="")
    assert len(engine.requests) == 3
    for request, turn in zip(engine.requests, trajectory.turns, strict=True):
        assert request.tokens == trajectory.tokens[: turn.start]
        assert all(trajectory.action_mask[turn.start : turn.end])
    said = [trajectory.tokens[turn.start : turn.end] for turn in trajectory.turns]
    expected = ["Left Left", "Sokoban: Workflow:", "Right"]
    assert said == [tuple(engine.ids(f" {text}")[:2]) for text in expected]
    assert [turn.action for turn in trajectory.turns] == ["Left Left", "Sokoban: Workflow:", "Right"]
    assert trajectory.action_tokens == 5


def test_logprobs_stand_where_the_mask_does(tokenizer: Any) -> None:
    engine = ScriptedEngine(tokenizer, lambda request: "Sokoban: Left")
    trajectory = play(engine, Toy(), target="", loses="")
    assert len(trajectory.tokens) == len(trajectory.action_mask) == len(trajectory.logprobs)
    for token_is_sampled, logprob in zip(trajectory.action_mask, trajectory.logprobs, strict=True):
        assert (logprob != 0.0) == token_is_sampled
    for request, turn in zip(engine.requests, trajectory.turns, strict=True):
        first = -0.5 - request.seed % 7
        assert trajectory.logprobs[turn.start : turn.end] == (first, first - 1)


def test_turns_are_sampled_with_different_seeds(engine: ScriptedEngine) -> None:
    play(engine, Toy())
    assert len({request.seed for request in engine.requests}) == 3
    assert {request.session for request in engine.requests} == {"s"}


def test_a_context_is_among_the_tokens_but_not_in_the_prompt(engine: ScriptedEngine) -> None:
    plain = play(engine, Toy())
    told = play(engine, Toy(), context=" Workflow: Up")
    extra = tuple(engine.ids(" Workflow: Up"))
    assert told.prompt == plain.prompt
    assert told.tokens[: told.prompt_length] == plain.tokens[: plain.prompt_length] + extra
    assert told.tokens[told.prompt_length :] == plain.tokens[plain.prompt_length :]


# -- groups ---------------------------------------------------------------------------------------------------------


def gather(engine: ScriptedEngine, toy: Toy, tasks: Sequence[Task] | None = None, **options: Any) -> Collected:
    defaults: dict[str, Any] = {"group_size": 3, "seed": 5}
    chosen = toy.tasks("train")[:3] if tasks is None else tasks
    budget = options.pop("budget", BUDGET)
    return asyncio.run(collect(actor(engine), toy, chosen, budget, **(defaults | options)))


def test_groups_are_whole_in_the_order_of_the_tasks_and_share_the_environments_seed(engine: ScriptedEngine) -> None:
    toy = Toy()
    collected = gather(engine, toy)
    assert [group.task.id for group in collected.groups] == ["train-0", "train-1", "train-2"]
    assert [len(group.trajectories) for group in collected.groups] == [3, 3, 3]
    seeds: dict[str, set[int]] = {}
    for environment in toy.made:
        for task, seed in environment.resets:
            seeds.setdefault(task, set()).add(seed)
    assert [len(found) for found in seeds.values()] == [1, 1, 1]
    assert len(set.union(*seeds.values())) == 3
    for group in collected.groups:
        assert len({t.prompt for t in group.trajectories}) == 1
        assert len({t.seed for t in group.trajectories}) == 3


def test_two_visits_of_one_task_are_two_episodes(engine: ScriptedEngine) -> None:
    toy = Toy()
    task = toy.tasks("train")[0]
    collected = gather(engine, toy, [task, task])
    assert len({t.seed for group in collected.groups for t in group.trajectories}) == 6
    assert len(set(engine.ended)) == 6


@pytest.mark.parametrize("call", ["make", "reset", "step"])
def test_a_broken_episode_is_played_again_in_a_fresh_environment(
    engine: ScriptedEngine, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy()
    broken = {1, 4}
    if call == "make":
        make, calls = toy.make, iter(range(100))

        def unreliable() -> ToyEnvironment:
            if next(calls) in broken:
                raise ConnectionError("no worker")
            return make()

        monkeypatch.setattr(toy, "make", unreliable)
    else:

        def fault(at: str, environment: ToyEnvironment) -> None:
            if at == call and environment.number in broken:
                raise ConnectionError("worker died")

        toy.faults = fault
    collected = gather(engine, toy)
    assert [len(group.trajectories) for group in collected.groups] == [3, 3, 3]
    assert collected.broken == {Outcome.ENV_ERROR: 2}
    assert collected.dropped == []
    assert all(len(environment.resets) == 1 for environment in toy.made)  # none was used twice
    assert len(toy.made) == 9 + (0 if call == "make" else 2)
    assert set(toy.fates.values()) == {1}


def test_after_the_last_try_the_whole_group_is_dropped(engine: ScriptedEngine) -> None:
    toy = Toy()
    tries: list[str] = []

    def fault(at: str, environment: ToyEnvironment) -> None:
        # The first member of train-1's group and both of its fresh tries.
        if at == "reset" and environment.number in (3, 4, 5):
            tries.append(environment.task.id)
            raise RuntimeError("gone")

    toy.faults = fault
    heard: list[Trajectory] = []
    collected = gather(engine, toy, retries=2, on_episode=heard.append)
    assert tries == ["train-1"] * 3
    assert [group.task.id for group in collected.groups] == ["train-0", "train-2"]
    assert [task.id for task in collected.dropped] == ["train-1"]
    assert collected.broken == {Outcome.ENV_ERROR: 3}
    assert all(t.outcome.has_reward for group in collected.groups for t in group.trajectories)
    assert all(t.outcome.has_reward for t in heard)
    assert sorted(engine.ended) == sorted(set(engine.ended))  # every try had a session of its own, and ended it
    assert (len(engine.ended), len(toy.made)) == (8, 11)  # those that failed before the prompt never had one


def test_a_hanging_environment_is_a_timeout_and_holds_up_nobody(engine: ScriptedEngine) -> None:
    toy = Toy()
    toy.faults = lambda at, e: asyncio.sleep(60) if at == "step" and e.task.id == "train-0" else None
    collected = gather(engine, toy, retries=1, budget=dataclasses.replace(BUDGET, step_seconds=0.05))
    assert collected.broken == {Outcome.TIMEOUT: 6}
    assert [task.id for task in collected.dropped] == ["train-0"]
    assert len(collected.groups) == 2


def test_an_engines_failure_is_raised_as_it_is_and_everything_is_closed(engine: ScriptedEngine) -> None:
    toy = Toy()

    def say(request: SampleRequest) -> str:
        if len(engine.requests) > 4:
            raise MemoryError("no room for keys and values")
        return "Right"

    engine.say = say
    with pytest.raises(MemoryError, match="no room"):
        gather(engine, toy)
    started = [environment for environment in toy.made if environment.resets]
    assert all(environment.closed == 1 for environment in started)
    assert len(engine.ended) == len(started)


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_concurrency_and_latency_change_nothing(engine: ScriptedEngine, concurrency: int) -> None:
    moves = ("Up", "Down", "Left", "Right")
    engine.say = lambda request: moves[request.seed % 4]
    expected = gather(engine, Toy(), group_size=4)
    engine.latency = lambda request: (request.seed % 5) / 1000
    toy, under_way = Toy(), []

    def watch(at: str, environment: ToyEnvironment) -> None:
        under_way.append(sum(1 for e in toy.made if e.resets and not e.closed))

    toy.faults = watch
    again = gather(engine, toy, group_size=4, concurrency=concurrency)
    assert again.groups == expected.groups
    assert max(under_way) <= concurrency
    assert gather(engine, Toy(), group_size=4, seed=6).groups != expected.groups


def test_contexts_go_to_their_own_tasks(engine: ScriptedEngine) -> None:
    collected = gather(engine, Toy(), contexts=["", " Up", " Left"])
    for group, told in zip(collected.groups, ["", "Up", "Left"], strict=True):
        for trajectory in group.trajectories:
            prompt = engine.tokenizer.decode(trajectory.tokens[: trajectory.prompt_length])
            assert prompt.endswith(told)
            assert prompt.startswith(f" {trajectory.prompt[0].content}")
            assert not trajectory.prompt[0].content.endswith(("Up", "Left"))


def test_a_real_model_gives_the_same_tokens_whatever_the_concurrency(tiny_model: Path) -> None:
    from skillsd.engines.torch.engine import TorchEngine

    def run(concurrency: int) -> Collected:
        engine = TorchEngine(str(tiny_model), device="cpu", max_sessions=32)
        toy = Toy(turns=4)
        budget = dataclasses.replace(BUDGET, turns=4, turn_tokens=3)
        return asyncio.run(
            collect(
                EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens)),
                toy,
                toy.tasks("train")[:3],
                budget,
                group_size=3,
                seed=1,
                concurrency=concurrency,
            )
        )

    one, all_at_once, again = run(1), run(99), run(99)
    assert all_at_once == again  # the same bits
    for a, b in zip(one.groups, all_at_once.groups, strict=True):
        for left, right in zip(a.trajectories, b.trajectories, strict=True):
            assert left.tokens == right.tokens
            assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)
