"""From groups of trajectories to what the objective needs: advantages, and what the teacher thinks of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skillsd.engines.base import Engine, TokenSequence, TrainItem, Weights
from skillsd.objective import group_advantages
from skillsd.rollouts.tokens import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.skills.context import with_context
from skillsd.training.imitation import BestSuccesses
from skillsd.training.lessons import Told
from skillsd.types import Group, Trajectory

Signals = dict[str, Tensor]


@dataclass
class Batch:
    """Training items by group, with what the log says of their making.

    Attributes:
        groups: the items of each group's trajectories, those without a single action token left out.
        taught: for each group, whether it has a teacher's signal.
        untold: groups whose context made a sequence longer than the model takes; they are trained without a teacher.
        flat: groups whose rewards are all equal: no advantage, so nothing to learn from the reward.
        imitated: items that are a task's best success, said again.
    """

    groups: list[list[TrainItem]] = field(default_factory=list)
    taught: list[bool] = field(default_factory=list)
    untold: int = 0
    flat: int = 0
    imitated: int = 0


def view(trajectory: Trajectory, context: str, renderer: ChatRenderer) -> TokenSequence:
    """The trajectory as somebody else sees it: a first prompt of its own (x + context, same chat template), then the
    sampled and heard ids verbatim."""
    prompt = renderer.prompt(with_context(trajectory.prompt, context))
    return TokenSequence(
        (*prompt, *trajectory.tokens[trajectory.prompt_length :]),
        (*[False] * len(prompt), *trajectory.action_mask[trajectory.prompt_length :]),
    )


def build_batch(
    groups: Sequence[Group],
    told: Sequence[Told],
    engine: Engine,
    renderer: ChatRenderer,
    *,
    temperature: float,
    scale_by_std: bool,
    distribution: bool = False,
    top_k: int | None = None,
    best: BestSuccesses | None = None,
    rescore: Weights | None = None,
) -> Batch:
    """Advantages of each group, and the teacher's log-probs of the groups that have a teacher.

    Args:
        told: what actor, student and teacher were told about each group's task. Where the student is told something
            else than who acted, it is trained on the same actions under its own prompt, and pi_old stays the actor's.
        distribution: ask the teacher for its whole distribution ``[tokens, vocabulary]`` at each token.
        top_k: then only for its `top_k` most likely tokens, and one bucket for the rest.
        best: successes to imitate; adds an item, without advantage or teacher, to each group whose task has one.
        rescore: the weights that acted, if the engine is to say itself how likely it held what was sampled.
    """
    batch = Batch()
    made: list[Signals] = []
    asked: list[tuple[TokenSequence, Signals]] = []
    acted: list[tuple[TokenSequence, Signals]] = []
    for group, words in zip(groups, told, strict=True):
        advantages = group_advantages(group.rewards, scale_by_std=scale_by_std)
        batch.flat += not bool(advantages.any())
        views = None
        if words.teacher is not None:
            views = [view(t, words.teacher, renderer) for t in group.trajectories]
            if max(len(v.tokens) for v in views) > engine.max_length:  # never cut: half a skill is another skill
                batch.untold, views = batch.untold + 1, None
        batch.taught.append(views is not None)
        items: list[TrainItem] = []
        for place, (trajectory, advantage) in enumerate(zip(group.trajectories, advantages.tolist(), strict=True)):
            if not trajectory.action_tokens:
                continue
            signals = _signals(trajectory, advantage, taught=views is not None)
            made.append(signals)
            if views is not None:
                asked.append((views[place], signals))
            sequence = TokenSequence(trajectory.tokens, trajectory.action_mask)
            acted.append((sequence, signals))
            if words.student != words.actor:
                sequence = view(trajectory, words.student, renderer)
            items.append(TrainItem(sequence, signals))
        if best is not None and (success := best.of(group.task.id)) is not None:
            made.append(_signals(success, 0.0, taught=False, imitated=True))
            items.append(TrainItem(view(success, words.student, renderer), made[-1]))
            batch.imitated += 1
        batch.groups.append(items)
    if rescore is not None:
        scores = engine.score([sequence for sequence, _ in acted], rescore, temperature=temperature)
        for signals in made:  # of what is imitated nothing is asked
            signals["rescored_logprobs"] = signals["old_logprobs"]
        for (_, signals), score in zip(acted, scores, strict=True):
            signals["rescored_logprobs"] = score
    _ask_teacher(made, asked, engine, temperature, distribution, top_k)
    return batch


def _signals(trajectory: Trajectory, advantage: float, *, taught: bool, imitated: bool = False) -> Signals:
    count = trajectory.action_tokens
    old = [p for p, sampled in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if sampled]
    return {
        "old_logprobs": torch.tensor(old, dtype=torch.float32),
        "advantages": torch.full((count,), advantage, dtype=torch.float32),
        "teacher_logprobs": torch.zeros(count),
        "has_teacher": torch.full((count,), taught),
        "imitated": torch.full((count,), imitated),
    }


def _ask_teacher(
    made: Sequence[Signals],
    asked: Sequence[tuple[TokenSequence, Signals]],
    engine: Engine,
    temperature: float,
    distribution: bool,
    top_k: int | None,
) -> None:
    """Put the teacher's answers among the signals that they belong to."""
    if not asked:
        return
    views = [sequence for sequence, _ in asked]
    answers: list[dict[str, Tensor]]
    if not distribution:
        answers = [{"teacher_logprobs": score} for score in engine.score(views, "teacher", temperature=temperature)]
    elif top_k is not None:
        tops = engine.score_top_k(views, top_k, "teacher", temperature=temperature)
        answers = [
            {"teacher_logprobs": top.chosen, "teacher_distribution": top.logprobs, "candidates": top.ids}
            for top in tops
        ]
    else:
        answers = []
        full = engine.score(views, "teacher", temperature=temperature, distribution=True)
        for sequence, score in zip(views, full, strict=True):
            marked = torch.tensor([t for t, m in zip(sequence.tokens, sequence.mask, strict=True) if m])
            chosen = score.gather(1, marked.unsqueeze(1)).squeeze(1)
            answers.append({"teacher_logprobs": chosen, "teacher_distribution": score})
    for (_, signals), answer in zip(asked, answers, strict=True):
        signals.update(answer)
    for signals in made:  # every item of a batch carries the same; where nobody answered, zeros that take no memory
        for name, like in answers[0].items():
            if name not in signals:
                shape = (len(signals["old_logprobs"]), *like.shape[1:])
                signals[name] = torch.zeros((), dtype=like.dtype).expand(shape)


def minibatches(batch: Batch, count: int, seed: int) -> list[list[TrainItem]]:
    """The batch in `count` parts of whole groups, as even as can be, in an order that the seed determines."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches"))
    order = torch.randperm(len(batch.groups), generator=generator).tolist()
    parts = [[item for place in order[i::count] for item in batch.groups[place]] for i in range(count)]
    return [part for part in parts if part]


def normalisers(items: Sequence[TrainItem]) -> dict[str, float]:
    """Global counts of a minibatch: the student's own action tokens, those of them that have a teacher, and the
    tokens of successes that are imitated."""
    imitated = float(sum(int(item.signals["imitated"].sum()) for item in items))
    return {
        "action_tokens": float(sum(item.sequence.marked for item in items)) - imitated,
        "teacher_tokens": float(sum(int(item.signals["has_teacher"].sum()) for item in items)),
        "imitated_tokens": imitated,
    }
