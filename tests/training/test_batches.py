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
from skillsd.rollouts.episode import Actor, Budget
from skillsd.rollouts.tokens import ChatRenderer
from skillsd.training.batches import Batch, build_batch, minibatches, normalisers, teacher_sequence
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
        collect(Actor(engine, renderer, 1.3), toy, toy.tasks("train")[:4], budget, group_size=4, seed=3)
    ).groups
    assert sum(len(set(group.rewards)) > 1 for group in found) >= 2  # else there would be nothing to test
    return found


def make_batch(groups: list[Group], contexts: list[str], engine: Any, renderer: ChatRenderer, **changes: Any) -> Batch:
    options = {"temperature": 1.3, "extra_tokens": 64, "scale_by_std": True, "distribution": False, **changes}
    return build_batch(groups, contexts, engine, renderer, **options)


# -- the teacher's view ---------------------------------------------------------------------------------------------


def test_the_teacher_reads_the_students_ids_verbatim_after_its_own_prompt(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    skill = tuple(engine.tokenizer.encode(SKILL, add_special_tokens=False))
    for trajectory in (t for group in groups for t in group.trajectories):
        view = teacher_sequence(trajectory, SKILL, renderer)
        begin = trajectory.prompt_length
        assert view.tokens == trajectory.tokens[:begin] + skill + trajectory.tokens[begin:]
        assert view.mask == trajectory.action_mask[:begin] + (False,) * len(skill) + trajectory.action_mask[begin:]
        assert view.marked == trajectory.action_tokens > 0


def test_teacher_logprobs_are_those_of_its_own_view(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer
) -> None:
    batch = make_batch(groups, [SKILL] * 4, engine, renderer)
    assert batch.taught == [True] * 4
    for group, items in zip(groups, batch.groups, strict=True):
        for trajectory, item in zip(group.trajectories, items, strict=True):
            view = teacher_sequence(trajectory, SKILL, renderer)
            [expected] = engine.score([view], "teacher", temperature=1.3)
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


def test_a_skill_over_the_budget_is_counted_and_skipped_never_cut(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[TokenSequence] = []
    score = engine.score

    def watch(sequences: Any, *rest: Any, **options: Any) -> Any:
        scored.extend(sequences)
        return score(sequences, *rest, **options)

    monkeypatch.setattr(engine, "score", watch)
    size = len(engine.tokenizer.encode(SKILL, add_special_tokens=False))
    contexts = [SKILL, SKILL + " Up", SKILL, ""]
    batch = make_batch(groups, contexts, engine, renderer, extra_tokens=size)
    assert batch.taught == [True, False, True, False]
    assert batch.untold == 1
    assert len(scored) == 8
    expected = [teacher_sequence(t, SKILL, renderer) for g in (groups[0], groups[2]) for t in g.trajectories]
    assert scored == expected
    assert not any(bool(item.signals["has_teacher"].any()) for item in batch.groups[1])


def test_a_skill_that_makes_a_sequence_longer_than_the_model_takes_is_skipped(
    groups: list[Group], engine: TorchEngine, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(teacher_sequence(t, SKILL, renderer).tokens) for t in groups[0].trajectories)
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
    def item(marks: int, taught: bool) -> TrainItem:
        return TrainItem(
            TokenSequence((0,) * (marks + 2), (False, False, *[True] * marks)),
            {"has_teacher": torch.full((marks,), taught)},
        )

    counts = normalisers([item(3, True), item(2, False), item(5, True)])
    assert counts == {"action_tokens": 10.0, "teacher_tokens": 8.0}


# -- a whole step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reward_weight", "lambda_sdl"), [(1.0, 0.0), (1.0, 0.3), (0.0, 1.0)])
@pytest.mark.parametrize("micro_batch_tokens", [20, 8192])
def test_the_gradient_of_a_step_equals_one_written_by_hand(
    tiny_model: Path,
    groups: list[Group],
    renderer: ChatRenderer,
    reward_weight: float,
    lambda_sdl: float,
    micro_batch_tokens: int,
) -> None:
    temperature, clip = 1.3, 0.2
    engine = TorchEngine(str(tiny_model), device="cpu", micro_batch_tokens=micro_batch_tokens)
    contexts = [SKILL, "", SKILL, ""]
    batch = make_batch(groups, contexts, engine, renderer)
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
    objective = Objective(reward_weight=reward_weight, lambda_sdl=lambda_sdl)
    engine.forward_backward(items, lambda s, g: objective(s, g, counts), temperature=temperature)

    # The reference: one trajectory at a time, through `transformers` alone, the losses as METHOD.md writes them.
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()  # the teacher, as it was when it was asked

    def logprobs(of: Any, tokens: tuple[int, ...], mask: tuple[bool, ...]) -> torch.Tensor:
        logits = of(input_ids=torch.tensor([tokens])).logits[0].double() / temperature
        places = [i for i, marked in enumerate(mask) if marked]
        return torch.stack([logits[i - 1].log_softmax(-1)[tokens[i]] for i in places])

    policy, distilled, tokens, taught, clipped = 0.0, 0.0, 0, 0, 0
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
                view = teacher_sequence(trajectory, context, renderer)
                with torch.no_grad():
                    teacher = logprobs(base, view.tokens, view.mask)
                log_ratio = now - teacher
                distilled = distilled + (rho * ((-log_ratio).exp() - 1 + log_ratio)).sum()
                taught += len(now)
    assert clipped
    assert taught < tokens
    (reward_weight * policy / tokens + lambda_sdl * distilled / taught).backward()
    for (name, mine), theirs in zip(engine.model.named_parameters(), model.parameters(), strict=True):
        assert mine.grad is not None
        scale = float(theirs.grad.abs().max())
        assert float((mine.grad - theirs.grad).abs().max()) < 2e-5 * max(scale, 1e-2), name
