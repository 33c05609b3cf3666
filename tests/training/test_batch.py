"""From groups to training items: the teacher's view, budgets, minibatches, and the gradient of a whole step."""

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

from skillsd.engines.base import TokenSequence, TrainItem
from skillsd.engines.torch.engine import TorchEngine
from skillsd.objective import Objective
from skillsd.rollouts.collect import collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.prompting.renderer import ChatRenderer
from skillsd.training.batch import Batch, build_batch, minibatches, normalisers, view
from skillsd.training.imitation import BestSuccesses
from skillsd.training.contexts import Told
from skillsd.types import Group

SKILL = " Workflow: Up Left"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TorchEngine:
    return TorchEngine(str(tiny_model), device="cpu", max_grad_norm=1e9)


@pytest.fixture(scope="module")
def renderer(engine: TorchEngine) -> ChatRenderer:
    return ChatRenderer(engine.tokenizer, engine.stop_tokens)


@pytest.fixture(scope="module")
def groups(engine: TorchEngine, renderer: ChatRenderer) -> list[Group]:
    toy = Toy()
    budget = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)
    found = asyncio.run(
        collect(EnginePolicy(engine, renderer, 1.3), toy, toy.tasks("train")[:4], budget, group_size=4, seed=3)
    ).groups
    assert sum(len(set(group.rewards)) > 1 for group in found) >= 2  # else there would be nothing to test
    return found


def make_batch(groups: list[Group], contexts: list[str], engine: Any, renderer: ChatRenderer, **changes: Any) -> Batch:
    """`contexts`: the teacher's; where it is empty there is no teacher."""
    told = [Told(teacher=context or None) for context in contexts]
    return build_batch(groups, told, engine, renderer, **{"temperature": 1.3, "scale_by_std": True, **changes})


# -- the teacher's view ---------------------------------------------------------------------------------------------


def test_the_teacher_reads_the_students_ids_verbatim_after_its_own_prompt(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    skill = tuple(engine.tokenizer.encode(SKILL, add_special_tokens=False))
    for trajectory in (t for group in groups for t in group.trajectories):
        told = view(trajectory, SKILL, renderer)
        begin = trajectory.prompt_length
        assert told.tokens == trajectory.tokens[:begin] + skill + trajectory.tokens[begin:]
        assert told.mask == trajectory.action_mask[:begin] + (False,) * len(skill) + trajectory.action_mask[begin:]
        assert told.marked == trajectory.action_tokens > 0


def test_teacher_logprobs_are_those_of_its_own_view(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [SKILL] * 4, engine, renderer)
    assert batch.taught == [True] * 4
    for group, items in zip(groups, batch.groups, strict=True):
        for trajectory, item in zip(group.trajectories, items, strict=True):
            [expected] = engine.score([view(trajectory, SKILL, renderer)], "teacher", temperature=1.3)
            assert item.signals["teacher_logprobs"] == pytest.approx(expected, abs=1e-5)
            assert bool(item.signals["has_teacher"].all())
            old = [p for p, m in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if m]
            assert item.signals["old_logprobs"].tolist() == pytest.approx(old, abs=1e-6)
            assert item.sequence.tokens == trajectory.tokens


def test_without_a_context_there_is_no_teacher(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, ["", SKILL, "", SKILL], engine, renderer)
    assert batch.taught == [False, True, False, True]
    assert batch.untold == 0
    for items, told in zip(batch.groups, batch.taught, strict=True):
        for item in items:
            assert item.signals["has_teacher"].tolist() == [told] * item.sequence.marked


def test_a_skill_that_makes_a_sequence_longer_than_the_model_takes_is_skipped(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(view(t, SKILL, renderer).tokens) for t in groups[0].trajectories)
    monkeypatch.setattr(engine, "max_length", longest)
    assert make_batch(groups[:1], [SKILL], engine, renderer).taught == [True]
    monkeypatch.setattr(engine, "max_length", longest - 1)
    batch = make_batch(groups[:1], [SKILL], engine, renderer)
    assert (batch.taught, batch.untold) == ([False], 1)


def test_with_distributions_every_item_has_the_same_signals(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [SKILL, "", "", ""], engine, renderer, distribution=True)
    plain = make_batch(groups, [SKILL, "", "", ""], engine, renderer)
    items = [item for part in batch.groups for item in part]
    assert len({frozenset(item.signals) for item in items}) == 1
    for item, other in zip(batch.groups[0], plain.groups[0], strict=True):
        rows = item.signals["teacher_distribution"]
        assert rows.exp().sum(1) == pytest.approx(torch.ones(len(rows)), abs=1e-5)
        assert item.signals["teacher_logprobs"] == pytest.approx(other.signals["teacher_logprobs"], abs=1e-5)


# -- advantages and minibatches -------------------------------------------------------------------------------------


def test_advantages_are_the_trajectorys_at_every_one_of_its_tokens(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [""] * 4, engine, renderer)
    assert batch.flat == sum(len(set(group.rewards)) == 1 for group in groups)
    for group, items in zip(groups, batch.groups, strict=True):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        spread = ((rewards - rewards.mean()) ** 2).mean().sqrt()
        for reward, item in zip(rewards, items, strict=True):
            expected = float((reward - rewards.mean()) / (spread + 1e-6))
            assert item.signals["advantages"].tolist() == pytest.approx([expected] * item.sequence.marked, abs=1e-5)


def _numbered(sizes: list[int]) -> Batch:
    items = [
        [TrainItem(TokenSequence((0, group, place), (False, True, True))) for place in range(size)]
        for group, size in enumerate(sizes)
    ]
    return Batch(groups=items)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9), st.integers(1, 5), st.integers(0, 99))
def test_minibatches_are_whole_groups_and_cover_everything_once(sizes: list[int], count: int, seed: int) -> None:
    batch = _numbered(sizes)
    parts = minibatches(batch, count, seed)
    seen = [item for part in parts for item in part]
    assert sorted(map(id, seen)) == sorted(id(item) for group in batch.groups for item in group)
    homes: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        assert part
        for item in part:
            homes.setdefault(item.sequence.tokens[1], set()).add(number)
    assert all(len(found) == 1 for found in homes.values())
    if all(sizes):
        in_part = [len({item.sequence.tokens[1] for item in part}) for part in parts]
        assert len(parts) == min(count, len(sizes))
        assert not in_part or max(in_part) - min(in_part) <= 1


def test_minibatches_depend_on_the_seed_alone() -> None:
    def order(seed: int) -> list[list[int]]:
        return [[item.sequence.tokens[1] for item in part] for part in minibatches(_numbered([1] * 8), 3, seed)]

    assert order(1) == order(1)
    assert len({str(order(seed)) for seed in range(5)}) > 1


def test_normalisers_count_the_minibatchs_tokens() -> None:
    def item(marks: int, taught: bool, imitated: bool = False) -> TrainItem:
        return TrainItem(
            TokenSequence((0,) * (marks + 2), (False, False, *[True] * marks)),
            {"has_teacher": torch.full((marks,), taught), "imitated": torch.full((marks,), imitated)},
        )

    counts = normalisers([item(3, True), item(2, False), item(5, True), item(4, False, imitated=True)])
    assert counts == {"action_tokens": 10.0, "teacher_tokens": 8.0, "imitated_tokens": 4.0}


# -- who was told what ----------------------------------------------------------------------------------------------


def test_a_student_that_was_told_is_trained_under_the_prompt_it_acted_under(
    engine: TorchEngine, renderer: ChatRenderer
) -> None:
    """Skill-augmented GRPO: the very tokens that were sampled, the skill among them."""
    [group] = acted(engine, renderer, SKILL)
    batch = build_batch([group], [Told(SKILL, SKILL)], engine, renderer, temperature=1.3, scale_by_std=True)
    for trajectory, item in zip(group.trajectories, batch.groups[0], strict=True):
        assert item.sequence.tokens == trajectory.tokens == view(trajectory, SKILL, renderer).tokens
    [[first, *_]] = batch.groups
    [again] = engine.score([first.sequence], temperature=1.3)
    assert again == pytest.approx(first.signals["old_logprobs"], abs=1e-5)


def test_of_a_teachers_rollouts_the_student_is_trained_under_its_own_prompt(
    engine: TorchEngine, renderer: ChatRenderer
) -> None:
    """The actions are the teacher's, and so is pi_old; the history before them begins with the plain prompt."""
    [group] = acted(engine, renderer, SKILL)
    batch = build_batch([group], [Told(SKILL, "", SKILL)], engine, renderer, temperature=1.3, scale_by_std=True)
    for trajectory, item in zip(group.trajectories, batch.groups[0], strict=True):
        assert item.sequence == view(trajectory, "", renderer)
        plain = renderer.prompt(trajectory.prompt)
        assert item.sequence.tokens[: len(plain)] == plain
        assert item.sequence.tokens[len(plain) :] == trajectory.tokens[trajectory.prompt_length :]
        assert len(plain) < trajectory.prompt_length
        old = [p for p, m in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if m]
        assert item.signals["old_logprobs"].tolist() == pytest.approx(old, abs=1e-6)
        # the teacher, asked again, says what it said when it acted
        assert item.signals["teacher_logprobs"] == pytest.approx(item.signals["old_logprobs"], abs=1e-5)


def test_a_teacher_that_is_told_nothing_says_what_the_student_said(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    """The control with an empty skill: with the same weights the signal is exactly zero."""
    batch = build_batch(groups, [Told(teacher="")] * 4, engine, renderer, temperature=1.3, scale_by_std=True)
    assert batch.taught == [True] * 4
    items = [item for part in batch.groups for item in part]
    objective = Objective(reward_weight=0.0, lambda_sdl=1.0)
    metrics = engine.forward_backward(items, lambda s, g: objective(s, g, normalisers(items)), temperature=1.3)
    gradient = max(float(p.grad.abs().max()) for p in engine.model.parameters() if p.grad is not None)
    engine.step(0.0)  # forgets the gradient
    engine.sync_teacher()
    assert metrics["teacher_k3"].value == 0.0
    assert gradient == 0.0


def test_a_success_is_imitated_beside_the_group_and_takes_part_in_nothing_else(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    best = BestSuccesses()
    best.update(groups)
    expected = [best.of(group.task.id) for group in groups]
    assert sum(success is not None for success in expected) > 0
    told = [Told(teacher=SKILL)] * 4
    plain = build_batch(groups, told, engine, renderer, temperature=1.3, scale_by_std=True)
    batch = build_batch(groups, told, engine, renderer, temperature=1.3, scale_by_std=True, best=best)
    assert batch.imitated == sum(success is not None for success in expected)
    for items, before, success in zip(batch.groups, plain.groups, expected, strict=True):
        own = [item for item in items if not item.signals["imitated"].any()]
        assert [item.sequence for item in own] == [item.sequence for item in before]
        again = [item for item in items if item.signals["imitated"].any()]
        assert [item.sequence.tokens for item in again] == ([success.tokens] if success else [])
        for item in again:
            assert not item.signals["has_teacher"].any()


def test_rescored_logprobs_are_the_engines_own_of_what_the_actor_saw(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    told = [Told(student=SKILL, teacher=SKILL)] * 4  # trained under another prompt than it acted under
    best = BestSuccesses()
    best.update(groups)
    batch = build_batch(
        groups, told, engine, renderer, temperature=1.3, scale_by_std=True, best=best, rescore="student"
    )
    for item in (item for items in batch.groups for item in items):
        # The sampler of this engine is exact, so the two agree to rounding.
        torch.testing.assert_close(item.signals["rescored_logprobs"], item.signals["old_logprobs"], atol=1e-5, rtol=0)
        if not item.signals["imitated"].any():
            assert item.signals["rescored_logprobs"] is not item.signals["old_logprobs"]


def acted(engine: TorchEngine, renderer: ChatRenderer, context: str) -> list[Group]:
    """A group whose actor was told `context`."""
    toy = Toy()
    budget = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)
    actor = EnginePolicy(engine, renderer, 1.3)
    tasks = toy.tasks("train")[:1]
    return asyncio.run(collect(actor, toy, tasks, budget, group_size=4, seed=3, contexts=[context])).groups


# -- a whole step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward_weight", "lambda_sdl", "imitation"), [(1.0, 0.0, 0.0), (1.0, 0.3, 0.0), (0.0, 1.0, 0.0), (1.0, 0.3, 0.2)]
)
@pytest.mark.parametrize("micro_batch_tokens", [20, 8192])
def test_the_gradient_of_a_step_equals_one_written_by_hand(
    tiny_model: Path,
    groups: list[Group],
    renderer: ChatRenderer,
    reward_weight: float,
    lambda_sdl: float,
    imitation: float,
    micro_batch_tokens: int,
) -> None:
    best = BestSuccesses()
    best.update(groups if imitation else [])
    temperature, clip = 1.3, 0.2
    engine = TorchEngine(str(tiny_model), device="cpu", micro_batch_tokens=micro_batch_tokens)
    contexts = [SKILL, "", SKILL, ""]
    batch = make_batch(groups, contexts, engine, renderer, best=best)
    # A student that has moved since it sampled: the ratios are not 1, and some are clipped.
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        for (name, mine), theirs in zip(engine.model.named_parameters(), model.parameters(), strict=True):
            noise = 0.02 * torch.randn(mine.shape, generator=generator)
            mine.add_(noise)
            theirs.add_(noise)
            assert torch.equal(mine, theirs), name

    items = [item for part in batch.groups for item in part]
    counts = normalisers(items)
    objective = Objective(reward_weight=reward_weight, lambda_sdl=lambda_sdl, imitation_weight=imitation)
    engine.forward_backward(items, lambda s, g: objective(s, g, counts), temperature=temperature)

    # The reference: one trajectory at a time, through `transformers` alone, the losses as METHOD.md writes them.
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()  # the teacher, as it was when it was asked

    def logprobs(of: Any, tokens: tuple[int, ...], mask: tuple[bool, ...]) -> torch.Tensor:
        logits = of(input_ids=torch.tensor([tokens])).logits[0].double() / temperature
        places = [i for i, marked in enumerate(mask) if marked]
        return torch.stack([logits[i - 1].log_softmax(-1)[tokens[i]] for i in places])

    policy, distilled, tokens, taught, clipped = 0.0, 0.0, 0, 0, 0
    said_again, again = torch.zeros((), dtype=torch.float64), 0
    for success in filter(None, (best.of(group.task.id) for group in groups)):
        likelihood = logprobs(model, success.tokens, success.action_mask)
        said_again, again = said_again - likelihood.sum(), again + len(likelihood)
    assert (again > 0) == (imitation > 0)
    for group, context in zip(groups, contexts, strict=True):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        for trajectory, reward in zip(group.trajectories, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
            now = logprobs(model, trajectory.tokens, trajectory.action_mask)
            old = torch.tensor([p for p, m in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if m])
            rho = (now - old).exp()
            clipped += int(((rho - 1).abs() > clip).sum())
            policy = policy - torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage).sum()
            tokens += len(now)
            if context:
                told = view(trajectory, context, renderer)
                with torch.no_grad():
                    teacher = logprobs(base, told.tokens, told.mask)
                log_ratio = now - teacher
                distilled = distilled + (rho * ((-log_ratio).exp() - 1 + log_ratio)).sum()
                taught += len(now)
    assert clipped
    assert taught < tokens
    control = imitation * said_again / max(again, 1)
    (reward_weight * policy / tokens + lambda_sdl * distilled / taught + control).backward()
    for (name, mine), theirs in zip(engine.model.named_parameters(), model.parameters(), strict=True):
        assert mine.grad is not None
        scale = float(theirs.grad.abs().max())
        assert float((mine.grad - theirs.grad).abs().max()) < 2e-5 * max(scale, 1e-2), name
