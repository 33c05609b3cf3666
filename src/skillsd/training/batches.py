"""From groups of trajectories to what the objective needs: advantages, and what the teacher thinks of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from skillsd.engines.base import Engine, TokenSequence, TrainItem
from skillsd.objective import group_advantages
from skillsd.rollouts.tokens import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.skills.context import with_context
from skillsd.types import Group, Trajectory


@dataclass
class Batch:
    """Training items by group, with what the log says of their making.

    Attributes:
        groups: the items of each group's trajectories, those without a single action token left out.
        taught: for each group, whether it has a teacher's signal.
        untold: groups whose context did not fit the teacher's budget; they are trained without a teacher.
        flat: groups whose rewards are all equal: no advantage, so nothing to learn from the reward.
    """

    groups: list[list[TrainItem]] = field(default_factory=list)
    taught: list[bool] = field(default_factory=list)
    untold: int = 0
    flat: int = 0


def teacher_sequence(trajectory: Trajectory, context: str, renderer: ChatRenderer) -> TokenSequence:
    """The teacher's view: its own first prompt (x + S(x), same chat template), then the student's ids verbatim."""
    prompt = renderer.prompt(with_context(trajectory.prompt, context))
    return TokenSequence(
        (*prompt, *trajectory.tokens[trajectory.prompt_length :]),
        (*[False] * len(prompt), *trajectory.action_mask[trajectory.prompt_length :]),
    )


def build_batch(
    groups: Sequence[Group],
    contexts: Sequence[str],
    engine: Engine,
    renderer: ChatRenderer,
    *,
    temperature: float,
    extra_tokens: int,
    scale_by_std: bool,
    distribution: bool,
) -> Batch:
    """Advantages of each group, and the teacher's log-probs of the groups that have a context.

    Args:
        contexts: what the teacher is told about each group's task; empty where there is no teacher.
        extra_tokens: the most tokens that a context may add to the prompt. One that adds more, or makes a sequence
            longer than the model takes, is never cut: its group goes without a teacher, and is counted.
        distribution: ask the teacher for its whole distribution ``[tokens, vocabulary]`` at each token.
    """
    batch = Batch()
    told: list[tuple[TokenSequence, dict[str, torch.Tensor]]] = []
    for group, context in zip(groups, contexts, strict=True):
        advantages = group_advantages(group.rewards, scale_by_std=scale_by_std)
        batch.flat += not bool(advantages.any())
        views: list[TokenSequence] | None = None
        if context:
            views = [teacher_sequence(t, context, renderer) for t in group.trajectories]
            if not _fits(views, group, extra_tokens, engine.max_length):
                batch.untold, views = batch.untold + 1, None
        batch.taught.append(views is not None)
        items: list[TrainItem] = []
        for place, (trajectory, advantage) in enumerate(zip(group.trajectories, advantages.tolist(), strict=True)):
            count = trajectory.action_tokens
            if not count:
                continue
            old = [p for p, sampled in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if sampled]
            signals = {
                "old_logprobs": torch.tensor(old, dtype=torch.float32),
                "advantages": torch.full((count,), advantage, dtype=torch.float32),
                "teacher_logprobs": torch.zeros(count),
                "has_teacher": torch.full((count,), views is not None),
            }
            if views is not None:
                told.append((views[place], signals))
            items.append(TrainItem(TokenSequence(trajectory.tokens, trajectory.action_mask), signals))
        batch.groups.append(items)
    _ask_teacher(batch, told, engine, temperature, distribution)
    return batch


def _fits(views: Sequence[TokenSequence], group: Group, extra_tokens: int, max_length: int) -> bool:
    added = len(views[0].tokens) - len(group.trajectories[0].tokens)
    return added <= extra_tokens and max(len(view.tokens) for view in views) <= max_length


def _ask_teacher(
    batch: Batch,
    told: Sequence[tuple[TokenSequence, dict[str, torch.Tensor]]],
    engine: Engine,
    temperature: float,
    distribution: bool,
) -> None:
    if not told:
        return
    views = [view for view, _ in told]
    scores = engine.score(views, "teacher", temperature=temperature, distribution=distribution)
    for (view, signals), score in zip(told, scores, strict=True):
        if distribution:
            signals["teacher_distribution"] = score
            marked = torch.tensor([t for t, m in zip(view.tokens, view.mask, strict=True) if m])
            score = score.gather(1, marked.unsqueeze(1)).squeeze(1)
        signals["teacher_logprobs"] = score
    if distribution:  # every item of a batch carries the same signals
        width = scores[0].shape[1]
        for item in (item for items in batch.groups for item in items):
            if "teacher_distribution" not in item.signals:
                item.signals["teacher_distribution"] = torch.zeros(item.sequence.marked, width)  # type: ignore[index]


def minibatches(batch: Batch, count: int, seed: int) -> list[list[TrainItem]]:
    """The batch in `count` parts of whole groups, as even as can be, in an order that the seed determines."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches"))
    order = torch.randperm(len(batch.groups), generator=generator).tolist()
    parts = [[item for place in order[i::count] for item in batch.groups[place]] for i in range(count)]
    return [part for part in parts if part]


def normalisers(items: Sequence[TrainItem]) -> dict[str, float]:
    """Global counts of a minibatch: action tokens, and those of them that have a teacher."""
    return {
        "action_tokens": float(sum(item.sequence.marked for item in items)),
        "teacher_tokens": float(sum(int(item.signals["has_teacher"].sum()) for item in items)),
    }
