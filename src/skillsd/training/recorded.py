"""The records of an iteration's groups: what was trained on, with the log-probs of student and teacher.

Everything is a by-product of training: there is no further forward pass. The loss terms can be evaluated again on what
was recorded (`token_values`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skillsd.config import RunConfig
from skillsd.engines.base import TrainItem
from skillsd.methods import method
from skillsd.metrics import PerToken
from skillsd.objective import (
    ACTION_MASK,
    DIVERGENCE,
    IMITATION_MASK,
    STUDENT_LOGPROBS,
    TEACHER_MASK,
    TOKEN_NUMBER,
    Objective,
    TokenLogprobs,
    group_advantages,
)
from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup
from skillsd.training.batch import Batch
from skillsd.training.contexts import PromptContexts
from skillsd.training.rollouts import TeacherContext
from skillsd.training.run import Run, objective_of
from skillsd.training.update import Updated
from skillsd.types import Group, Trajectory


def record_groups(
    run: Run,
    groups: Sequence[Group],
    used: Sequence[TeacherContext],
    prompts: Sequence[PromptContexts],
    batch: Batch,
    updated: Updated,
) -> list[RecordedGroup]:
    """The groups of an iteration as they were trained on.

    Args:
        used, prompts: of each group, as `commit_contexts` returns them.
        batch: as `build_batch` made it of the groups.
    """
    total = sum(item.sequence.marked for items in batch.groups for item in items)
    tokens = _Tokens(updated.per_token, total)
    return [
        _record_group(run, group, context, prompt, batch, place, updated.steps.get(place), tokens)
        for place, (group, context, prompt) in enumerate(zip(groups, used, prompts, strict=True))
    ]


def _record_group(
    run: Run,
    group: Group,
    context: TeacherContext,
    prompts: PromptContexts,
    batch: Batch,
    place: int,
    step: tuple[int, bool] | None,
    tokens: _Tokens,
) -> RecordedGroup:
    taught = batch.taught[place]
    advantages = group_advantages(group.rewards, scale_by_std=run.config.objective.scale_by_std).tolist()
    items = iter(batch.groups[place])  # of the trajectories with action tokens, then of the success to imitate
    episodes = [
        _record_episode(t, advantage, next(items) if t.action_tokens else None, taught, tokens)
        for t, advantage in zip(group.trajectories, advantages, strict=True)
    ]
    imitated = None
    if (item := next(items, None)) is not None and run.best and (success := run.best.of(group.task.id)):
        imitated = _record_episode(success, 0.0, item, False, tokens)
    messages = group.trajectories[0].prompt
    teacher = None if prompts.teacher is None else run.renderer.prompt(messages, prompts.teacher)
    student = run.renderer.prompt(messages, prompts.student)
    has_oracle = run.method.context == "oracle" and context.text is not None
    minibatch, applied = step or (None, False)
    every = [*group.trajectories, *([imitated.trajectory] if imitated else [])]
    sampled = {i for t in every for i, marked in zip(t.tokens, t.action_mask, strict=True) if marked}
    return RecordedGroup(
        iteration=run.iteration + 1,
        task=group.task,
        context="skill" if context.skill else "oracle" if has_oracle else None,
        skill_id=context.skill.id if context.skill else None,
        context_text=context.text,
        teacher_prompt=None if teacher is None else run.renderer.with_markup(teacher),
        teacher_prompt_length=None if teacher is None else len(teacher),
        student_prompt=run.renderer.with_markup(student),
        student_prompt_length=len(student),
        taught=taught,
        untaught=None if taught else _untaught(run, group, context, prompts),
        minibatch=minibatch,
        applied=applied,
        episodes=tuple(episodes),
        imitated=imitated,
        token_texts={token: run.renderer.token_text(token) for token in sorted(sampled)},
    )


def _record_episode(
    trajectory: Trajectory, advantage: float, item: TrainItem | None, taught: bool, tokens: _Tokens
) -> RecordedEpisode:
    if item is None:
        return RecordedEpisode(trajectory, advantage, () if taught else None, ())
    signals = item.signals
    return RecordedEpisode(
        trajectory,
        advantage,
        teacher_logprobs=tuple(signals["teacher_logprobs"].tolist()) if taught else None,
        student_logprobs=tokens.of(STUDENT_LOGPROBS, item),
        rescored_logprobs=tuple(signals["rescored_logprobs"].tolist()) if "rescored_logprobs" in signals else None,
        divergence=tokens.of(DIVERGENCE, item) if taught else None,
    )


def _untaught(run: Run, group: Group, context: TeacherContext, prompts: PromptContexts) -> str | None:
    if run.method.teacher == "none":
        return None
    what = "reference solution" if run.method.context == "oracle" else "skill"
    if context.reading:
        return "the student acted with a skill in its own prompt (reading.share)"
    if context.too_long:
        return f"the {what} has more than {run.config.skills.teacher_extra_tokens} tokens (skills.teacher_extra_tokens)"
    if prompts.teacher is not None:
        return f"with the {what}, an episode has more than the {run.learner.max_length} tokens that the model takes"
    limit = run.config.teacher.max_group_reward
    if limit is not None and sum(group.rewards) > limit * len(group.rewards):
        return f"the group's mean reward is above {limit:g} (teacher.max_group_reward)"
    return f"there is no {what} for this task" + (" yet" if what == "skill" else "")


class _Tokens:
    """The metrics of single tokens, by the tokens' numbers."""

    def __init__(self, metrics: Mapping[str, PerToken], total: int) -> None:
        self._values: dict[str, Tensor] = {}
        self._known: dict[str, Tensor] = {}
        for name, metric in metrics.items():
            places = torch.tensor(metric.tokens)
            self._values[name] = torch.zeros(total).index_put((places,), torch.tensor(metric.values))
            self._known[name] = torch.zeros(total, dtype=torch.bool).index_fill(0, places, True)

    def of(self, name: str, item: TrainItem) -> tuple[float, ...] | None:
        """The item's values; None if one of them is unknown."""
        places = item.signals[TOKEN_NUMBER]
        if name not in self._values or not bool(self._known[name][places].all()):
            return None
        return tuple(self._values[name][places].tolist())


# -- the loss again -------------------------------------------------------------------------------------------------


def recorded_objective(config: RunConfig, iteration: int) -> Objective:
    """The objective of an iteration, from 1, for `token_values` and `loss_shares`. The user's own code is not needed:
    the estimator's values are recorded, and further terms (``objective.terms``) are left out."""
    section = config.objective.model_copy(update={"estimator": "iw_k3", "top_k": None, "terms": []})
    progress = (iteration - 1) / max(1, config.training.iterations)
    return objective_of(config.model_copy(update={"objective": section}), method(config.method), progress)


def signals_of(episode: RecordedEpisode) -> dict[str, Tensor]:
    """The signals of the episode's action tokens, ``[action tokens]`` each (docs/engines.md), without distributions."""
    old = torch.tensor(episode.old_logprobs)
    teacher, rescored = episode.teacher_logprobs, episode.rescored_logprobs
    signals = {
        "old_logprobs": old,
        "advantages": torch.full_like(old, episode.advantage),
        "teacher_logprobs": torch.zeros_like(old) if teacher is None else torch.tensor(teacher),
        ACTION_MASK: torch.ones_like(old, dtype=torch.bool),
        TEACHER_MASK: torch.full_like(old, teacher is not None, dtype=torch.bool),
        IMITATION_MASK: torch.zeros_like(old, dtype=torch.bool),
    }
    return signals if rescored is None else {**signals, "rescored_logprobs": torch.tensor(rescored)}


def token_values(episode: RecordedEpisode, objective: Objective) -> dict[str, list[float]]:
    """What the loss terms log at each action token: name, as in docs/metrics.md -> values ``[action tokens]``.

    The terms are evaluated again on what was recorded; the estimator's value (``distil_value``) is the recorded one.
    Empty if the student's log-probs are unknown.
    """
    if not episode.student_logprobs:
        return {}
    student, signals = TokenLogprobs(torch.tensor(episode.student_logprobs)), signals_of(episode)
    values: dict[str, list[float]] = {}
    for term in objective.terms:
        if bool(signals[term.mask].all()):
            _, logged = term.fn(student, signals)
            values |= {name: (1.0 * column).tolist() for name, column in logged.items() if name != "distil_value"}
    return values if episode.divergence is None else {**values, "distil_value": list(episode.divergence)}


def loss_shares(groups: Sequence[RecordedGroup], objective: Objective) -> list[list[list[float]]]:
    """Each action token's share of its minibatch's loss, reward_weight * L_GRPO + lambda_sdl * L_SDL.

    For L_SDL it is the share of the value that metrics.jsonl reports; the gradient has another weight.

    Args:
        groups: all groups of the iteration.

    Returns:
        Group -> episode -> ``[action tokens]``; nan where a value was not recorded.
    """
    tokens, counted = Counter[int | None](), Counter[int | None]()
    for group in groups:
        here = sum(t.action_tokens for t in group.trajectories)
        tokens[group.minibatch] += here
        counted[group.minibatch] += here if group.taught or objective.normaliser == "tokens" else 0

    def shares(group: RecordedGroup, episode: RecordedEpisode) -> list[float]:
        values, total = token_values(episode, objective), [0.0] * episode.trajectory.action_tokens
        parts = [("policy_loss", objective.reward_weight / max(1, tokens[group.minibatch]))]
        if group.taught:
            parts.append(("distil_value", objective.lambda_sdl / max(1, counted[group.minibatch])))
        for name, scale in parts:
            if scale:
                column = values.get(name, [math.nan] * len(total))
                total = [share + scale * value for share, value in zip(total, column, strict=True)]
        return total

    return [[shares(group, episode) for episode in group.episodes] for group in groups]
