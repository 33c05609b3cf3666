"""From groups to training items: teacher sequences, signals, minibatches, and the gradient of a whole step."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_env import Toy
from transformers import AutoModelForCausalLM

from skillsd.engines.base import Engine, TokenSequence, TrainItem
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.options import TorchOptions
from skillsd.objective import CHOSEN, WHOLE, Objective, Want
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.collect import collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.training.batch import Batch, build_batch, minibatches, teacher_sequence
from skillsd.training.contexts import PromptContexts
from skillsd.training.imitation import BestSuccesses
from skillsd.types import Group, Trajectory

SKILL = " Workflow: Up Left"


@pytest.fixture(scope="module")
def learner(tiny_model: Path) -> TorchEngine:
    return TorchEngine(str(tiny_model), device="cpu", max_grad_norm=1e9)


@pytest.fixture(scope="module")
def renderer(learner: TorchEngine) -> ChatRenderer:
    return ChatRenderer(learner.tokenizer, learner.stop_tokens)


@pytest.fixture(scope="module")
def groups(learner: TorchEngine, renderer: ChatRenderer) -> list[Group]:
    found = rollouts(learner, renderer, 4)
    assert sum(len(set(group.rewards)) > 1 for group in found) >= 2  # otherwise all advantages would be zero
    return found


def rollouts(learner: TorchEngine, renderer: ChatRenderer, tasks: int, context: str = "") -> list[Group]:
    """A group of four trajectories for each of the first tasks, sampled with `context` in the prompt."""
    toy = Toy()
    engine = Engine(learner, learner, "torch", TorchOptions.capabilities)
    return asyncio.run(
        collect(
            EnginePolicy(engine, renderer, 1.3),
            toy,
            toy.tasks("train")[:tasks],
            Budget(turns=3, turn_tokens=2, trajectory_tokens=60),
            group_size=4,
            seed=3,
            contexts=[context] * tasks if context else None,
        )
    ).groups


def make_batch(
    groups: list[Group],
    contexts: PromptContexts | list[str],
    learner: TorchEngine,
    renderer: ChatRenderer,
    *,
    want: Want = CHOSEN,
    best: BestSuccesses | None = None,
    rescore: Any = None,
) -> Batch:
    """`contexts`: the same for every group, or each group's teacher context, where "" disables the teacher."""
    if isinstance(contexts, PromptContexts):
        given = [contexts] * len(groups)
    else:
        given = [PromptContexts(teacher=context or None) for context in contexts]
    options: dict[str, Any] = {"temperature": 1.3, "scale_by_std": True, "want": want, "best": best, "rescore": rescore}
    return asyncio.run(build_batch(groups, given, learner, renderer, **options))


def items_of(batch: Batch) -> list[TrainItem]:
    return [item for items in batch.groups for item in items]


def chosen(learner: TorchEngine, sequence: TokenSequence, weights: Any = "student") -> torch.Tensor:
    [found] = asyncio.run(learner.logprobs([sequence], weights, temperature=1.3))
    return found.chosen


def sampled_logprobs(trajectory: Trajectory) -> list[float]:
    return [p for p, sampled in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if sampled]


# -- the teacher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after"])
def test_teacher_sequence_is_the_teachers_prompt_and_the_students_ids_verbatim(
    groups: list[Group], learner: TorchEngine, place: Any
) -> None:
    renderer = ChatRenderer(learner.tokenizer, learner.stop_tokens, place=place)
    skill = tuple(learner.tokenizer.encode(SKILL, add_special_tokens=False))
    for trajectory in (t for group in groups for t in group.trajectories):
        sequence = teacher_sequence(trajectory, SKILL, renderer)
        begin = trajectory.prompt_length if place == "after" else 0  # this model's prompt has only the task
        assert sequence.tokens == trajectory.tokens[:begin] + skill + trajectory.tokens[begin:]
        assert sequence.mask == trajectory.action_mask[:begin] + (False,) * len(skill) + trajectory.action_mask[begin:]
        assert sequence.marked == trajectory.action_tokens > 0


def test_teacher_logprobs_are_those_of_the_teacher_sequence(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [SKILL] * 4, learner, renderer)
    assert batch.taught == [True] * 4
    for group, items in zip(groups, batch.groups, strict=True):
        for trajectory, item in zip(group.trajectories, items, strict=True):
            expected = chosen(learner, teacher_sequence(trajectory, SKILL, renderer), "teacher")
            assert item.signals["teacher_logprobs"] == pytest.approx(expected, abs=1e-5)
            assert bool(item.signals["teacher_mask"].all())
            assert item.signals["old_logprobs"].tolist() == pytest.approx(sampled_logprobs(trajectory), abs=1e-6)
            assert item.sequence.tokens == trajectory.tokens


def test_group_without_a_context_has_no_teacher(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, ["", SKILL, "", SKILL], learner, renderer)
    assert batch.taught == [False, True, False, True]
    assert batch.without_teacher == 0
    for items, taught in zip(batch.groups, batch.taught, strict=True):
        for item in items:
            assert item.signals["teacher_mask"].tolist() == [taught] * item.sequence.marked


def test_teacher_sequence_longer_than_the_model_takes_disables_the_teacher(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(teacher_sequence(t, SKILL, renderer).tokens) for t in groups[0].trajectories)
    monkeypatch.setattr(learner, "max_length", longest)
    assert make_batch(groups[:1], [SKILL], learner, renderer).taught == [True]
    monkeypatch.setattr(learner, "max_length", longest - 1)
    batch = make_batch(groups[:1], [SKILL], learner, renderer)
    assert (batch.taught, batch.without_teacher) == ([False], 1)


def test_with_distributions_every_item_has_the_same_signals(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [SKILL, "", "", ""], learner, renderer, want=WHOLE)
    plain = make_batch(groups, [SKILL, "", "", ""], learner, renderer)
    assert len({frozenset(item.signals) for item in items_of(batch)}) == 1
    for item, other in zip(batch.groups[0], plain.groups[0], strict=True):
        rows = item.signals["teacher_distribution"]
        assert rows.exp().sum(1) == pytest.approx(torch.ones(len(rows)), abs=1e-5)
        assert item.signals["teacher_logprobs"] == pytest.approx(other.signals["teacher_logprobs"], abs=1e-5)


# -- advantages and minibatches -------------------------------------------------------------------------------------


def test_every_token_has_its_trajectorys_advantage(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [""] * 4, learner, renderer)
    assert batch.zero_advantage == sum(len(set(group.rewards)) == 1 for group in groups)
    for group, items in zip(groups, batch.groups, strict=True):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        std = ((rewards - rewards.mean()) ** 2).mean().sqrt()
        for reward, item in zip(rewards, items, strict=True):
            expected = float((reward - rewards.mean()) / (std + 1e-6))
            assert item.signals["advantages"].tolist() == pytest.approx([expected] * item.sequence.marked, abs=1e-5)


def _numbered(sizes: list[int]) -> Batch:
    items = [
        [TrainItem(TokenSequence((0, group, place), (False, True, True))) for place in range(size)]
        for group, size in enumerate(sizes)
    ]
    return Batch(groups=items)


def items_by_part(batch: Batch, count: int, seed: int) -> list[list[TrainItem]]:
    return [[item for place in part for item in batch.groups[place]] for part in minibatches(batch, count, seed)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9), st.integers(1, 5), st.integers(0, 99))
def test_minibatches_are_whole_groups_and_cover_each_item_once(sizes: list[int], count: int, seed: int) -> None:
    batch = _numbered(sizes)
    parts = items_by_part(batch, count, seed)
    seen = [item for part in parts for item in part]
    assert sorted(map(id, seen)) == sorted(id(item) for group in batch.groups for item in group)
    parts_of_group: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        assert part
        for item in part:
            parts_of_group.setdefault(item.sequence.tokens[1], set()).add(number)
    assert all(len(found) == 1 for found in parts_of_group.values())
    if all(sizes):
        in_part = [len({item.sequence.tokens[1] for item in part}) for part in parts]
        assert len(parts) == min(count, len(sizes))
        assert not in_part or max(in_part) - min(in_part) <= 1


def test_minibatches_depend_only_on_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        return [[item.sequence.tokens[1] for item in part] for part in items_by_part(_numbered([1] * 8), 3, seed)]

    assert order(1) == order(1)
    assert len({str(order(seed)) for seed in range(5)}) > 1


def test_counts_are_those_of_the_minibatchs_tokens() -> None:
    def signals(marks: int, taught: bool, imitated: bool = False) -> dict[str, torch.Tensor]:
        return {
            "action_mask": torch.full((marks,), not imitated),
            "teacher_mask": torch.full((marks,), taught),
            "imitation_mask": torch.full((marks,), imitated),
        }

    minibatch = [signals(3, True), signals(2, False), signals(5, True), signals(4, False, imitated=True)]
    loss = Objective(imitation_weight=0.1).template.bind(minibatch)
    assert loss.counts == {"action_mask": 10, "teacher_mask": 8, "imitation_mask": 4}


# -- prompts of sampler, student and teacher ------------------------------------------------------------------------


def test_student_with_a_context_is_trained_under_the_prompt_it_sampled_under(
    learner: TorchEngine, renderer: ChatRenderer
) -> None:
    """Skill-augmented GRPO: exactly the sampled tokens, the skill among them."""
    [group] = rollouts(learner, renderer, 1, SKILL)
    batch = make_batch([group], PromptContexts(sampler=SKILL, student=SKILL), learner, renderer)
    for trajectory, item in zip(group.trajectories, batch.groups[0], strict=True):
        assert item.sequence.tokens == trajectory.tokens == teacher_sequence(trajectory, SKILL, renderer).tokens
    [[first, *_]] = batch.groups
    assert chosen(learner, first.sequence) == pytest.approx(first.signals["old_logprobs"], abs=1e-5)


def test_student_trains_on_teacher_rollouts_under_the_plain_prompt(
    learner: TorchEngine, renderer: ChatRenderer
) -> None:
    """The actions and pi_old are the teacher's; the history starts with the plain prompt."""
    [group] = rollouts(learner, renderer, 1, SKILL)
    contexts = PromptContexts(sampler=SKILL, student="", teacher=SKILL)
    batch = make_batch([group], contexts, learner, renderer)
    for trajectory, item in zip(group.trajectories, batch.groups[0], strict=True):
        assert item.sequence == teacher_sequence(trajectory, "", renderer)
        plain = renderer.prompt(trajectory.prompt)
        assert item.sequence.tokens[: len(plain)] == plain
        assert item.sequence.tokens[len(plain) :] == trajectory.tokens[trajectory.prompt_length :]
        assert len(plain) < trajectory.prompt_length
        assert item.signals["old_logprobs"].tolist() == pytest.approx(sampled_logprobs(trajectory), abs=1e-6)
        # The teacher sampled, so its log-probs are those of the rollouts.
        assert item.signals["teacher_logprobs"] == pytest.approx(item.signals["old_logprobs"], abs=1e-5)


def test_teacher_with_an_empty_context_gives_no_signal(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    """The control with an empty skill: with equal weights, loss and gradient are exactly zero."""
    batch = make_batch(groups, PromptContexts(teacher=""), learner, renderer)
    assert batch.taught == [True] * 4
    items = items_of(batch)
    loss = Objective(reward_weight=0.0, lambda_sdl=1.0).template.bind(item.signals for item in items)

    async def train() -> tuple[Any, float]:
        metrics = await learner.forward_backward(items, loss, temperature=1.3)
        gradient = max(float(p.grad.abs().max()) for p in learner.model.parameters() if p.grad is not None)
        await learner.step(0.0)  # discards the gradient
        await learner.sync_teacher()
        return metrics, gradient

    metrics, gradient = asyncio.run(train())
    assert metrics["teacher_k3"].value == 0.0
    assert gradient == 0.0


def test_imitated_success_is_an_item_of_its_own(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    best = BestSuccesses()
    best.update(groups)
    expected = [best.of(group.task.id) for group in groups]
    assert sum(success is not None for success in expected) > 0
    plain = make_batch(groups, PromptContexts(teacher=SKILL), learner, renderer)
    batch = make_batch(groups, PromptContexts(teacher=SKILL), learner, renderer, best=best)
    assert batch.imitated == sum(success is not None for success in expected)
    for items, before, success in zip(batch.groups, plain.groups, expected, strict=True):
        own = [item for item in items if not item.signals["imitation_mask"].any()]
        assert [item.sequence for item in own] == [item.sequence for item in before]
        imitated = [item for item in items if item.signals["imitation_mask"].any()]
        assert [item.sequence.tokens for item in imitated] == ([success.tokens] if success else [])
        for item in imitated:
            assert not item.signals["teacher_mask"].any()
            assert not item.signals["action_mask"].any()


def test_rescored_logprobs_are_the_learners_under_the_samplers_prompt(
    groups: list[Group], learner: TorchEngine, renderer: ChatRenderer
) -> None:
    best = BestSuccesses()
    best.update(groups)
    contexts = PromptContexts(student=SKILL, teacher=SKILL)  # trained under another prompt than sampled under
    batch = make_batch(groups, contexts, learner, renderer, best=best, rescore="student")
    for item in items_of(batch):
        # This engine samples and scores with the same weights and kernels: equal up to rounding.
        torch.testing.assert_close(item.signals["rescored_logprobs"], item.signals["old_logprobs"], atol=1e-5, rtol=0)
        if not item.signals["imitation_mask"].any():
            assert item.signals["rescored_logprobs"] is not item.signals["old_logprobs"]


# -- a whole step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward_weight", "lambda_sdl", "normaliser", "imitation"),
    [
        (1.0, 0.0, "tokens", 0.0),
        (1.0, 0.3, "tokens", 0.0),
        (0.0, 1.0, "taught", 0.0),
        (1.0, 0.3, "taught", 0.2),
    ],
)
@pytest.mark.parametrize("micro_batch_tokens", [20, 8192])
def test_gradient_of_a_step_equals_a_plain_implementation(
    tiny_model: Path,
    groups: list[Group],
    renderer: ChatRenderer,
    reward_weight: float,
    lambda_sdl: float,
    normaliser: Any,
    imitation: float,
    micro_batch_tokens: int,
) -> None:
    best = BestSuccesses()
    best.update(groups if imitation else [])
    temperature, low, high = 1.3, 0.8, 1.28
    learner = TorchEngine(str(tiny_model), device="cpu", micro_batch_tokens=micro_batch_tokens)
    contexts = [SKILL, "", SKILL, ""]
    batch = make_batch(groups, contexts, learner, renderer, best=best)
    # Move the student away from the weights that sampled, so that ratios differ from 1 and some are clipped.
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        for (name, ours), theirs in zip(learner.model.named_parameters(), model.parameters(), strict=True):
            noise = 0.02 * torch.randn(ours.shape, generator=generator)
            ours.add_(noise)
            theirs.add_(noise)
            assert torch.equal(ours, theirs), name

    items = items_of(batch)
    objective = Objective(reward_weight, lambda_sdl, normaliser, imitation)
    loss = objective.template.bind(item.signals for item in items)
    asyncio.run(learner.forward_backward(items, loss, temperature=temperature))

    # The reference: one trajectory at a time with `transformers` alone, the losses as written in docs/method.md.
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model
    ).eval()  # the teacher, with the weights of the time of scoring

    def logprobs(of: Any, tokens: tuple[int, ...], mask: tuple[bool, ...]) -> torch.Tensor:
        logits = of(input_ids=torch.tensor([tokens])).logits[0].double() / temperature
        places = [i for i, marked in enumerate(mask) if marked]
        return torch.stack([logits[i - 1].log_softmax(-1)[tokens[i]] for i in places])

    policy, distilled, tokens, taught, clipped = 0.0, 0.0, 0, 0, 0
    imitation_loss, imitated = torch.zeros((), dtype=torch.float64), 0
    for success in filter(None, (best.of(group.task.id) for group in groups)):
        likelihood = logprobs(model, success.tokens, success.action_mask)
        imitation_loss, imitated = imitation_loss - likelihood.sum(), imitated + len(likelihood)
    assert (imitated > 0) == (imitation > 0)
    for group, context in zip(groups, contexts, strict=True):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        for trajectory, reward in zip(group.trajectories, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
            now = logprobs(model, trajectory.tokens, trajectory.action_mask)
            old = torch.tensor([p for p, m in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if m])
            rho = (now - old).exp()
            clipped += int(((rho < low) | (rho > high)).sum())
            policy = policy - torch.minimum(rho * advantage, rho.clamp(low, high) * advantage).sum()
            tokens += len(now)
            if context:
                sequence = teacher_sequence(trajectory, context, renderer)
                with torch.no_grad():
                    teacher = logprobs(base, sequence.tokens, sequence.mask)
                log_ratio = now - teacher
                distilled = distilled + (rho * ((-log_ratio).exp() - 1 + log_ratio)).sum()
                taught += len(now)
    assert clipped
    assert taught < tokens
    control = imitation * imitation_loss / max(imitated, 1)
    count = {"tokens": tokens, "taught": taught}[normaliser]
    (reward_weight * policy / tokens + lambda_sdl * distilled / count + control).backward()
    for (name, ours), theirs in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        scale = float(theirs.grad.abs().max())
        assert float((ours.grad - theirs.grad).abs().max()) < 2e-5 * max(scale, 1e-2), name
