"""One episode: its outcomes and its tokens. Groups of episodes: seeds, retries, failures."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_env import Toy, ToyEnvironment
from transformers import AutoTokenizer

from skillsd.engines.base import Engine, Sample, Sampler, SampleRequest, WeightsHandle
from skillsd.engines.options import Capabilities
from skillsd.engines.torch.engine import TorchEngine
from skillsd.envs.base import Step
from skillsd.errors import UserError
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.collect import Collected, collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.episode import run_episode
from skillsd.rollouts.policy import Budget
from skillsd.types import Outcome, Task, Trajectory

BUDGET = Budget(turns=3, turn_tokens=2, trajectory_tokens=40, step_seconds=5.0)


class ScriptedSampler(Sampler):
    """Answers with a function of the request, and records the requests."""

    def __init__(self, tokenizer: Any, answer: Callable[[SampleRequest], str]) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.stop_tokens = frozenset(self.ids(f" {m}")[0] for m in ("Up", "Down", "Left", "Right"))
        self.max_length = 256
        self.version = 0
        self.requests: list[SampleRequest] = []
        self.ended: list[str] = []
        self.latency: Callable[[SampleRequest], float] = lambda request: 0.0

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def sample(self, request: SampleRequest) -> Sample:
        self.requests.append(request)
        await asyncio.sleep(self.latency(request))
        ids = tuple(self.ids(f" {self.answer(request)}")[: request.max_tokens])
        logprobs = tuple(-0.5 - i - request.seed % 7 for i in range(len(ids)))
        return Sample(ids, logprobs, "stop" if ids[-1] in self.stop_tokens else "length", self.version)

    def end_session(self, session: str) -> None:
        self.ended.append(session)

    async def load(self, weights: WeightsHandle) -> None:
        self.version = weights.version


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def sampler(tokenizer: Any) -> ScriptedSampler:
    return ScriptedSampler(tokenizer, lambda request: "Right")


def policy_of(sampler: Any) -> EnginePolicy:
    """A policy on an engine whose learner is only asked for its maximum length."""
    engine = Engine(sampler, sampler, "scripted", Capabilities())
    return EnginePolicy(engine, ChatRenderer(sampler.tokenizer, sampler.stop_tokens))


def play(
    sampler: ScriptedSampler, toy: Toy, target: str = "Up", loses: str = "Down", budget: Budget = BUDGET, **options: Any
) -> Trajectory:
    task = Task("t", "toy", "train", {"target": target, "loses": loses})
    seeds = {"seed": 1, "environment_seed": 2, "session": "s", **options}
    return asyncio.run(run_episode(policy_of(sampler), toy.make(), task, budget, **seeds))


def fail_at(call: str, error: Callable[[], BaseException]) -> Callable[[str, ToyEnvironment], None]:
    def fault(at: str, environment: ToyEnvironment) -> None:
        if at == call:
            raise error()

    return fault


# -- outcomes -------------------------------------------------------------------------------------------------------


def test_solved_and_failed(sampler: ScriptedSampler) -> None:
    solved = play(sampler, Toy(), target="Right")
    assert (solved.outcome, solved.reward, solved.success, len(solved.turns)) == (Outcome.SOLVED, 1.0, True, 1)
    failed = play(sampler, Toy(), loses="Right")
    assert (failed.outcome, failed.reward, failed.success, len(failed.turns)) == (Outcome.FAILED, 0.5, False, 1)


def test_out_of_turns(sampler: ScriptedSampler) -> None:
    trajectory = play(sampler, Toy())
    assert trajectory.outcome is Outcome.TRUNCATED_TURNS
    assert (len(trajectory.turns), trajectory.reward) == (3, 0.5)
    assert trajectory.outcome.has_reward


@pytest.mark.parametrize("limit", range(1, 16))
def test_trajectory_never_exceeds_the_token_budget(sampler: ScriptedSampler, limit: int) -> None:
    # Each word is one token: the prompt has 3, a move 1, an observation 1.
    trajectory = play(sampler, Toy(turns=5), budget=Budget(5, 2, limit))
    assert len(trajectory.tokens) <= max(limit, trajectory.prompt_length)
    # The last token is sampled: an observation that no turn follows is not included.
    assert not trajectory.turns or trajectory.action_mask[-1]
    complete = len(play(sampler, Toy(turns=5), budget=Budget(5, 2, 1000)).tokens)
    expected = Outcome.TRUNCATED_TOKENS if limit < complete else Outcome.TRUNCATED_TURNS
    assert trajectory.outcome is expected


def test_turn_is_limited_to_the_rest_of_the_budget(tokenizer: Any) -> None:
    sampler = ScriptedSampler(tokenizer, lambda request: "Sokoban: Sokoban: Up")
    trajectory = play(sampler, Toy(), budget=Budget(3, 3, 5))
    assert sampler.requests[0].max_tokens == 5 - trajectory.prompt_length
    assert play(sampler, Toy(), budget=Budget(3, 3, 40)).outcome is not None
    assert sampler.requests[1].max_tokens == 3


@pytest.mark.parametrize("call", ["reset", "step"])
@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("simulator failed"),
        lambda: TimeoutError("its own"),
        lambda: asyncio.CancelledError(),
        lambda: ValueError(),
    ],
)
def test_exception_in_the_environment_is_env_error(
    sampler: ScriptedSampler, call: str, error: Callable[[], BaseException]
) -> None:
    toy = Toy()
    toy.faults = fail_at(call, error)
    trajectory = play(sampler, toy)
    assert trajectory.outcome is Outcome.ENV_ERROR
    assert not trajectory.outcome.has_reward
    assert call in trajectory.error
    assert "longer than" not in trajectory.error  # not taken for a missed deadline
    assert sampler.ended == (["s"] if call == "step" else [])  # before the prompt there is no session
    assert toy.made[0].closed == 1


@pytest.mark.parametrize("call", ["reset", "step"])
def test_hanging_environment_is_timeout(sampler: ScriptedSampler, call: str) -> None:
    toy = Toy()
    toy.faults = lambda at, environment: asyncio.sleep(60) if at == call else None
    trajectory = play(sampler, toy, budget=dataclasses.replace(BUDGET, step_seconds=0.05))
    assert trajectory.outcome is Outcome.TIMEOUT
    assert trajectory.error.startswith(call)
    assert "0.05 s" in trajectory.error
    assert sampler.ended == (["s"] if call == "step" else [])  # before the prompt there is no session
    assert toy.made[0].closed == 1


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_failure_to_close_does_not_change_the_trajectory(sampler: ScriptedSampler, how: str) -> None:
    toy = Toy()
    if how == "raises":
        toy.faults = fail_at("close", lambda: RuntimeError("stuck"))
    else:
        toy.faults = lambda at, environment: asyncio.sleep(60) if at == "close" else None
    trajectory = play(sampler, toy, target="Right", budget=dataclasses.replace(BUDGET, step_seconds=0.05))
    assert (trajectory.outcome, trajectory.error) == (Outcome.SOLVED, "")


@pytest.mark.parametrize(
    "invalid", [None, Step("x", False, float("nan"), False), Step("x", False, 1.5, False), Step("x", True, -0.1, False)]
)
def test_invalid_step_is_env_error(sampler: ScriptedSampler, invalid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(self: ToyEnvironment, action: str) -> Any:
        return invalid

    monkeypatch.setattr(ToyEnvironment, "step", step)
    assert play(sampler, Toy()).outcome is Outcome.ENV_ERROR


# -- tokens ---------------------------------------------------------------------------------------------------------


def test_prefix_never_changes_and_samples_stay_verbatim(tokenizer: Any) -> None:
    words = iter(["Left Left", "Sokoban: Workflow:", "Right"])
    sampler = ScriptedSampler(tokenizer, lambda request: next(words))
    trajectory = play(sampler, Toy(), target="", loses="")
    assert len(sampler.requests) == 3
    for request, turn in zip(sampler.requests, trajectory.turns, strict=True):
        assert request.tokens == trajectory.tokens[: turn.start]
        assert all(trajectory.action_mask[turn.start : turn.end])
    sampled = [trajectory.tokens[turn.start : turn.end] for turn in trajectory.turns]
    expected = ["Left Left", "Sokoban: Workflow:", "Right"]
    assert sampled == [tuple(sampler.ids(f" {text}")[:2]) for text in expected]
    assert [turn.action for turn in trajectory.turns] == ["Left Left", "Sokoban: Workflow:", "Right"]
    assert trajectory.action_tokens == 5


def test_logprobs_are_at_the_places_of_the_mask(tokenizer: Any) -> None:
    sampler = ScriptedSampler(tokenizer, lambda request: "Sokoban: Left")
    trajectory = play(sampler, Toy(), target="", loses="")
    assert len(trajectory.tokens) == len(trajectory.action_mask) == len(trajectory.logprobs)
    for token_is_sampled, logprob in zip(trajectory.action_mask, trajectory.logprobs, strict=True):
        assert (logprob != 0.0) == token_is_sampled
    for request, turn in zip(sampler.requests, trajectory.turns, strict=True):
        first = -0.5 - request.seed % 7
        assert trajectory.logprobs[turn.start : turn.end] == (first, first - 1)


def test_turns_have_different_seeds(sampler: ScriptedSampler) -> None:
    play(sampler, Toy())
    assert len({request.seed for request in sampler.requests}) == 3
    assert {request.session for request in sampler.requests} == {"s"}


def test_context_is_in_the_tokens_but_not_in_the_recorded_prompt(sampler: ScriptedSampler) -> None:
    plain = play(sampler, Toy())
    with_skill = play(sampler, Toy(), context=" Workflow: Up")
    extra = tuple(sampler.ids(" Workflow: Up"))
    assert with_skill.prompt == plain.prompt
    assert with_skill.tokens[: with_skill.prompt_length] == extra + plain.tokens[: plain.prompt_length]
    assert with_skill.tokens[with_skill.prompt_length :] == plain.tokens[plain.prompt_length :]


# -- versions -------------------------------------------------------------------------------------------------------


def test_versions_are_the_oldest_and_the_newest_that_sampled(sampler: ScriptedSampler) -> None:
    versions = iter([4, 3, 5])

    def answer(request: SampleRequest) -> str:
        sampler.version = next(versions)
        return "Left"

    sampler.answer = answer
    assert play(sampler, Toy(), target="", loses="").versions == (3, 5)


def test_trajectory_without_samples_has_no_versions(sampler: ScriptedSampler) -> None:
    toy = Toy()
    toy.faults = fail_at("reset", lambda: RuntimeError("gone"))
    assert play(sampler, toy).versions is None
    assert play(sampler, Toy(), budget=Budget(3, 2, 1)).versions is None


# -- groups ---------------------------------------------------------------------------------------------------------


def gather(sampler: ScriptedSampler, toy: Toy, tasks: Sequence[Task] | None = None, **options: Any) -> Collected:
    defaults: dict[str, Any] = {"group_size": 3, "seed": 5}
    chosen = toy.tasks("train")[:3] if tasks is None else tasks
    budget = options.pop("budget", BUDGET)
    return asyncio.run(collect(policy_of(sampler), toy, chosen, budget, **(defaults | options)))


def test_groups_are_in_the_order_of_the_tasks_and_share_the_environments_seed(sampler: ScriptedSampler) -> None:
    toy = Toy()
    collected = gather(sampler, toy)
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


def test_repeated_task_gives_different_episodes(sampler: ScriptedSampler) -> None:
    toy = Toy()
    task = toy.tasks("train")[0]
    collected = gather(sampler, toy, [task, task])
    assert len({t.seed for group in collected.groups for t in group.trajectories}) == 6
    assert len(set(sampler.ended)) == 6


@pytest.mark.parametrize("call", ["make", "reset", "step"])
def test_failed_episode_is_played_again_in_a_new_environment(
    sampler: ScriptedSampler, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy()
    failing = {1, 4}
    if call == "make":
        make, calls = toy.make, iter(range(100))

        def unreliable() -> ToyEnvironment:
            if next(calls) in failing:
                raise ConnectionError("no worker")
            return make()

        monkeypatch.setattr(toy, "make", unreliable)
    else:

        def fault(at: str, environment: ToyEnvironment) -> None:
            if at == call and environment.number in failing:
                raise ConnectionError("worker died")

        toy.faults = fault
    collected = gather(sampler, toy)
    assert [len(group.trajectories) for group in collected.groups] == [3, 3, 3]
    assert collected.infra_failures == {Outcome.ENV_ERROR: 2}
    assert collected.dropped == []
    assert all(len(environment.resets) == 1 for environment in toy.made)  # no environment was reused
    assert len(toy.made) == 9 + (0 if call == "make" else 2)
    assert set(toy.times_closed.values()) == {1}


def test_environment_that_cannot_be_made_on_this_machine_stops_the_collection(
    sampler: ScriptedSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, attempts = Toy(), []

    def refuse() -> ToyEnvironment:
        attempts.append(1)
        raise UserError("no jail here")

    monkeypatch.setattr(toy, "make", refuse)
    with pytest.raises(UserError, match="no jail here"):
        gather(sampler, toy)
    assert len(attempts) <= 9  # no episode was tried again


def test_group_is_dropped_after_the_last_attempt(sampler: ScriptedSampler) -> None:
    toy = Toy()
    attempts: list[str] = []

    def fault(at: str, environment: ToyEnvironment) -> None:
        # The first member of train-1's group, and both of its retries.
        if at == "reset" and environment.number in (3, 4, 5):
            attempts.append(environment.task.id)
            raise RuntimeError("gone")

    toy.faults = fault
    finished: list[Trajectory] = []
    collected = gather(sampler, toy, retries=2, on_episode=finished.append)
    assert attempts == ["train-1"] * 3
    assert [group.task.id for group in collected.groups] == ["train-0", "train-2"]
    assert [task.id for task in collected.dropped] == ["train-1"]
    assert collected.infra_failures == {Outcome.ENV_ERROR: 3}
    assert all(t.outcome.has_reward for group in collected.groups for t in group.trajectories)
    assert all(t.outcome.has_reward for t in finished)
    assert sorted(sampler.ended) == sorted(set(sampler.ended))  # each attempt ended its own session
    assert (len(sampler.ended), len(toy.made)) == (8, 11)  # attempts that failed before the prompt had none


def test_hanging_environment_does_not_delay_other_groups(sampler: ScriptedSampler) -> None:
    toy = Toy()
    toy.faults = lambda at, e: asyncio.sleep(60) if at == "step" and e.task.id == "train-0" else None
    collected = gather(sampler, toy, retries=1, budget=dataclasses.replace(BUDGET, step_seconds=0.05))
    assert collected.infra_failures == {Outcome.TIMEOUT: 6}
    assert [task.id for task in collected.dropped] == ["train-0"]
    assert len(collected.groups) == 2


def test_engine_failure_is_raised_unchanged_and_environments_are_closed(sampler: ScriptedSampler) -> None:
    toy = Toy()

    def answer(request: SampleRequest) -> str:
        if len(sampler.requests) > 4:
            raise MemoryError("no room for keys and values")
        return "Right"

    sampler.answer = answer
    with pytest.raises(MemoryError, match="no room"):
        gather(sampler, toy)
    started = [environment for environment in toy.made if environment.resets]
    assert all(environment.closed == 1 for environment in started)
    assert len(sampler.ended) == len(started)


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_result_does_not_depend_on_concurrency_and_latency(sampler: ScriptedSampler, concurrency: int) -> None:
    moves = ("Up", "Down", "Left", "Right")
    sampler.answer = lambda request: moves[request.seed % 4]
    expected = gather(sampler, Toy(), group_size=4)
    sampler.latency = lambda request: (request.seed % 5) / 1000
    toy, in_progress = Toy(), []

    def watch(at: str, environment: ToyEnvironment) -> None:
        in_progress.append(sum(1 for e in toy.made if e.resets and not e.closed))

    toy.faults = watch
    again = gather(sampler, toy, group_size=4, concurrency=concurrency)
    assert again.groups == expected.groups
    assert max(in_progress) <= concurrency
    assert gather(sampler, Toy(), group_size=4, seed=6).groups != expected.groups


def test_each_task_gets_its_own_context(sampler: ScriptedSampler) -> None:
    collected = gather(sampler, Toy(), contexts=["", " Up", " Left"])
    for group, context in zip(collected.groups, ["", "Up", "Left"], strict=True):
        for trajectory in group.trajectories:
            prompt = sampler.tokenizer.decode(trajectory.tokens[: trajectory.prompt_length])
            assert prompt.startswith(f" {context}")
            assert prompt.endswith(f" {trajectory.prompt[0].content}")
            assert not trajectory.prompt[0].content.startswith(("Up", "Left"))


def test_model_samples_the_same_tokens_at_any_concurrency(tiny_model: Path) -> None:
    def run(concurrency: int) -> Collected:
        engine = TorchEngine(str(tiny_model), device="cpu", max_sessions=32)
        toy = Toy(turns=4)
        budget = dataclasses.replace(BUDGET, turns=4, turn_tokens=3)
        tasks = toy.tasks("train")[:3]
        policy = policy_of(engine)
        return asyncio.run(collect(policy, toy, tasks, budget, group_size=3, seed=1, concurrency=concurrency))

    one, all_at_once, again = run(1), run(99), run(99)
    assert all_at_once == again  # bit-identical
    for a, b in zip(one.groups, all_at_once.groups, strict=True):
        for left, right in zip(a.trajectories, b.trajectories, strict=True):
            assert left.tokens == right.tokens
            assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)
