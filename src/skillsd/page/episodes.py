"""The third and fourth view: an iteration's groups, their episodes, and what the teacher made of each token.

`chunk` is the content of one iteration, compressed in the page and opened when it is looked at. `index_rows` is the
line of each episode in the light part, for lists, search and filters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skillsd.objective import Objective
from skillsd.page.numbers import mean, rounded, short
from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup
from skillsd.training.recorded import loss_shares, token_values
from skillsd.types import Trajectory

Picture = Callable[[Trajectory, int | None], Mapping[str, Any] | None]
"""(episode, turn; None for the state before the first one) -> the environment's picture; None: none."""

VALUES = {"teacher_log_ratio": "gap", "ratio": "ratio", "clip_fraction": "clipped", "distil_value": "divergence"}
"""A metric of the loss terms -> its name in the page. ``gap`` is l, student minus teacher."""

SHARE_DECIMALS = 7
"""A token's share of the loss is small."""

INDEX = (
    "iteration", "group", "member", "task", "outcome", "success", "reward", "advantage", "turns", "tokens", "gap",
    "skill",
)  # fmt: skip
"""The columns of the index. ``gap`` is the mean of l over the episode's tokens."""


def index_rows(groups: Sequence[RecordedGroup]) -> list[list[Any]]:
    """A row per episode, in the order of `INDEX`."""
    rows = []
    for place, group in enumerate(groups):
        for member, episode in enumerate(group.episodes):
            played, gaps = episode.trajectory, episode.gaps
            rows.append(
                [
                    group.iteration, place, member, group.task.id, played.outcome.value, played.success,
                    short(played.reward), short(episode.advantage), len(played.turns), played.action_tokens,
                    None if gaps is None else short(-mean(gaps)), group.skill_id,
                ]
            )  # fmt: skip
    return rows


def chunk(groups: Sequence[RecordedGroup], objective: Objective, picture: Picture) -> dict[str, Any]:
    """An iteration, JSON-serialisable.

    Args:
        objective: of the iteration, for the values of each token.
        picture: see `Picture`.
    """
    shares = loss_shares(groups, objective)
    return {"groups": [_group(group, objective, picture, of) for group, of in zip(groups, shares, strict=True)]}


def _group(
    group: RecordedGroup, objective: Objective, picture: Picture, shares: Sequence[Sequence[float]]
) -> dict[str, Any]:
    return {
        "task": group.task.id,
        "difficulty": short(group.task.difficulty),
        "context": group.context,
        "skill": group.skill_id,
        "context_text": group.context_text,
        "taught": group.taught,
        "untaught": group.untaught,
        "applied": group.applied,
        "student_prompt": group.student_prompt,
        "student_prompt_tokens": group.student_prompt_length,
        "teacher_prompt_tokens": group.teacher_prompt_length,
        "difference": None if group.teacher_prompt is None else difference(group.student_prompt, group.teacher_prompt),
        "episodes": [
            _episode(group, episode, objective, picture, of) for episode, of in zip(group.episodes, shares, strict=True)
        ],
    }


def _episode(
    group: RecordedGroup,
    episode: RecordedEpisode,
    objective: Objective,
    picture: Picture,
    shares: Sequence[float],
) -> dict[str, Any]:
    played = episode.trajectory
    return {
        "seed": str(played.seed),  # too large for the numbers of JavaScript
        "error": played.error,
        "prompt": [{"role": message.role, "content": message.content} for message in played.prompt],
        "picture": picture(played, None),
        "turns": _turns(played, picture),
        "tokens": _tokens(group, episode, objective, shares),
    }


def _turns(played: Trajectory, picture: Picture) -> list[dict[str, Any]]:
    """``tokens`` is the turn's span among the action tokens."""
    before = _counted(played.action_mask)
    turns = []
    for place, turn in enumerate(played.turns):
        shown = {"action": turn.action, "observation": turn.observation}
        span = [before[turn.start], before[turn.end]] if before else [0, 0]
        turns.append({**shown, "tokens": span, "picture": picture(played, place)})
    return turns


def _counted(mask: Sequence[bool]) -> list[int]:
    """For each position, and the end, the number of action tokens before it; empty without tokens."""
    counts = [0] if mask else []
    for sampled in mask:
        counts.append(counts[-1] + sampled)
    return counts


def _tokens(
    group: RecordedGroup, episode: RecordedEpisode, objective: Objective, shares: Sequence[float]
) -> dict[str, Any]:
    """Columns with a value per action token."""
    played = episode.trajectory
    sampled = [place for place, is_sampled in enumerate(played.action_mask) if is_sampled]
    values = token_values(episode, objective)
    columns = {
        "text": [group.token_texts.get(played.tokens[place], "") for place in sampled],
        "id": [played.tokens[place] for place in sampled],
        "old": rounded(episode.old_logprobs),
        "student": rounded(episode.student_logprobs),
        "teacher": rounded(episode.teacher_logprobs),
        "share": rounded(shares, SHARE_DECIMALS),
        **{name: rounded(values[metric]) for metric, name in VALUES.items() if metric in values},
    }
    return {name: column for name, column in columns.items() if column is not None}


def difference(student: str, teacher: str) -> list[list[str]]:
    """The teacher's prompt as a change of the student's: pieces ``["=" | "-" | "+", text]`` in order.

    The words that both begin and end with are kept; what is between them was taken out and put in. A context is one
    insertion, so this is exact, and it takes linear time.
    """
    ours, theirs = (re.findall(r"\w+|\s+|.", text, re.DOTALL) for text in (student, teacher))
    shortest = min(len(ours), len(theirs))
    head = next((n for n in range(shortest) if ours[n] != theirs[n]), shortest)
    left = shortest - head
    tail = next((n for n in range(left) if ours[-1 - n] != theirs[-1 - n]), left)
    parts = (
        ("=", ours[:head]),
        ("-", ours[head : len(ours) - tail]),
        ("+", theirs[head : len(theirs) - tail]),
        ("=", ours[len(ours) - tail :]),
    )
    return [[kind, "".join(words)] for kind, words in parts if words]
