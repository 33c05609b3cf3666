"""From groups of trajectories to training items: advantages, and the teacher's log-prob of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from skillsd.engines.base import Learner, TokenSequence, TrainItem, Weights
from skillsd.objective import (
    ACTION_MASK,
    CHOSEN,
    IMITATION_MASK,
    TEACHER_MASK,
    TOKEN_NUMBER,
    TokenLogprobs,
    Want,
    group_advantages,
)
from skillsd.prompting.renderer import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.training.contexts import PromptContexts
from skillsd.training.imitation import BestSuccesses
from skillsd.types import Group, Trajectory

Signals = dict[str, Tensor]


@dataclass
class Batch:
    """Training items by group.

    Attributes:
        groups: the items of each group's trajectories; trajectories without action tokens are left out.
        taught: for each group, whether it has a teacher's log-probs.
        without_teacher: number of groups with a teacher sequence longer than the model takes; they train without a
            teacher.
        zero_advantage: number of groups with equal rewards, which give L_GRPO no gradient.
        imitated: number of items that are a task's best success, added for self-imitation.
    """

    groups: list[list[TrainItem]] = field(default_factory=list)
    taught: list[bool] = field(default_factory=list)
    without_teacher: int = 0
    zero_advantage: int = 0
    imitated: int = 0


def teacher_sequence(trajectory: Trajectory, context: str, renderer: ChatRenderer) -> TokenSequence:
    """The trajectory's ids under another first prompt: x + context in the same chat template, then the sampled and
    observed ids verbatim."""
    prompt = renderer.prompt(trajectory.prompt, context)
    return TokenSequence(
        (*prompt, *trajectory.tokens[trajectory.prompt_length :]),
        (*[False] * len(prompt), *trajectory.action_mask[trajectory.prompt_length :]),
    )


async def build_batch(
    groups: Sequence[Group],
    contexts: Sequence[PromptContexts],
    learner: Learner,
    renderer: ChatRenderer,
    *,
    temperature: float,
    scale_by_std: bool,
    want: Want = CHOSEN,
    best: BestSuccesses | None = None,
    replayed: Sequence[TrainItem] = (),
    rescore: Weights | None = None,
) -> Batch:
    """Compute each group's advantages, and have the teacher re-score the groups that have a teacher context.

    Args:
        contexts: of each group. If the student's context differs from the sampler's, the student trains on the sampled
            actions under its own prompt, and pi_old stays the sampler's.
        want: which of the teacher's log-probs the loss needs.
        best: successes to imitate; adds an item, without advantage or teacher, to each group whose task has one.
        replayed: demonstrations to imitate, spread over the groups.
        rescore: the weights that sampled, for the learner to score the sampled tokens again (the signal
            ``rescored_logprobs``). None: not needed.
    """
    batch = Batch()
    made: list[Signals] = []
    to_teach: list[tuple[TokenSequence, Signals]] = []
    sampled: list[tuple[TokenSequence, Signals]] = []
    for group, context in zip(groups, contexts, strict=True):
        advantages = group_advantages(group.rewards, scale_by_std=scale_by_std)
        batch.zero_advantage += not bool(advantages.any())
        teacher_views = None
        if context.teacher is not None:
            teacher_views = [teacher_sequence(t, context.teacher, renderer) for t in group.trajectories]
            # Too long: train without a teacher. The context is never cut, since a truncated skill is another skill.
            if max(len(v.tokens) for v in teacher_views) > learner.max_length:
                batch.without_teacher, teacher_views = batch.without_teacher + 1, None
        batch.taught.append(teacher_views is not None)
        items: list[TrainItem] = []
        for place, (trajectory, advantage) in enumerate(zip(group.trajectories, advantages.tolist(), strict=True)):
            if not trajectory.action_tokens:
                continue
            signals = _signals(trajectory, advantage, taught=teacher_views is not None)
            made.append(signals)
            if teacher_views is not None:
                to_teach.append((teacher_views[place], signals))
            sequence = TokenSequence(trajectory.tokens, trajectory.action_mask)
            sampled.append((sequence, signals))
            if context.student != context.sampler:
                sequence = teacher_sequence(trajectory, context.student, renderer)
            items.append(TrainItem(sequence, signals))
        if best is not None and (success := best.of(group.task.id)) is not None:
            made.append(_signals(success, 0.0, taught=False, imitated=True))
            items.append(TrainItem(teacher_sequence(success, context.student, renderer), made[-1]))
            batch.imitated += 1
        batch.groups.append(items)
    for place, item in enumerate(replayed if batch.groups else ()):
        made.append(dict(item.signals))
        batch.groups[place % len(batch.groups)].append(replace(item, signals=made[-1]))
    _number_tokens(made)
    if rescore is not None:
        scored = await learner.logprobs([sequence for sequence, _ in sampled], rescore, temperature=temperature)
        for signals in made:  # a placeholder for imitated items, whose ratio is not used
            signals["rescored_logprobs"] = signals["old_logprobs"]
        for (_, signals), logprobs in zip(sampled, scored, strict=True):
            signals["rescored_logprobs"] = logprobs.chosen
    if to_teach:
        sequences = [sequence for sequence, _ in to_teach]
        answers = await learner.logprobs(sequences, "teacher", temperature=temperature, want=want)
        _add_teacher(made, [signals for _, signals in to_teach], answers)
    return batch


def _signals(trajectory: Trajectory, advantage: float, *, taught: bool, imitated: bool = False) -> Signals:
    count = trajectory.action_tokens
    old = [p for p, sampled in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if sampled]
    return {
        "old_logprobs": torch.tensor(old, dtype=torch.float32),
        "advantages": torch.full((count,), advantage, dtype=torch.float32),
        "teacher_logprobs": torch.zeros(count),
        ACTION_MASK: torch.full((count,), not imitated),
        TEACHER_MASK: torch.full((count,), taught),
        IMITATION_MASK: torch.full((count,), imitated),
    }


def _number_tokens(made: Sequence[Signals]) -> None:
    """Add the numbers of the tokens, counted through the whole batch."""
    start = 0
    for signals in made:
        end = start + len(signals["old_logprobs"])
        signals[TOKEN_NUMBER] = torch.arange(start, end)
        start = end


def _add_teacher(made: Sequence[Signals], taught: Sequence[Signals], answers: Sequence[TokenLogprobs]) -> None:
    """Add the teacher's log-probs to the signals of the taught items."""
    wide: dict[str, Tensor] = {}
    for signals, answer in zip(taught, answers, strict=True):
        signals["teacher_logprobs"] = answer.chosen
        if answer.distribution is not None:
            wide["teacher_distribution"] = signals["teacher_distribution"] = answer.distribution
        if answer.candidates is not None:
            wide["candidates"] = signals["candidates"] = answer.candidates
    for signals in made:  # every item of a batch needs the same signals: the others get zeros, which take no memory
        for name, like in wide.items():
            if name not in signals:
                shape = (len(signals["old_logprobs"]), *like.shape[1:])
                signals[name] = torch.zeros((), dtype=like.dtype).expand(shape)


def minibatches(batch: Batch, count: int, seed: int) -> list[list[int]]:
    """The numbers of the groups in `count` parts, as equal as possible, in a random order determined by the seed.

    Parts without items are left out.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches"))
    order = torch.randperm(len(batch.groups), generator=generator).tolist()
    parts = [order[i::count] for i in range(count)]
    return [part for part in parts if any(batch.groups[place] for place in part)]
