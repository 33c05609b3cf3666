"""Trajectories as JSON and back without loss, for checkpoints and interrupted evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skillsd.types import Message, Outcome, Task, Trajectory, Turn

FORMAT = 2


def task_to_json(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "env": task.env,
        "split": task.split,
        "payload": dict(task.payload),
        "difficulty": task.difficulty,
    }


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """A record of plain dicts, lists, numbers and strings; `json.dumps` turns it into one line."""
    return {
        "format": FORMAT,
        "task": task_to_json(trajectory.task),
        "prompt": [{"role": message.role, "content": message.content} for message in trajectory.prompt],
        "tokens": list(trajectory.tokens),
        "action_mask": [int(sampled) for sampled in trajectory.action_mask],  # 0 and 1 are short
        "logprobs": list(trajectory.logprobs),
        "prompt_length": trajectory.prompt_length,
        "turns": [
            {
                "action": turn.action,
                "observation": turn.observation,
                "start": turn.start,
                "end": turn.end,
                "info": dict(turn.info),
            }
            for turn in trajectory.turns
        ],
        "outcome": trajectory.outcome.value,
        "reward": trajectory.reward,
        "success": trajectory.success,
        "seed": trajectory.seed,
        "error": trajectory.error,
        "versions": None if trajectory.versions is None else list(trajectory.versions),
    }


def trajectory_from_json(record: Mapping[str, Any]) -> Trajectory:
    """The trajectory that `trajectory_to_json` wrote.

    Raises:
        ValueError: if the record is of another format, or something in it is missing, unknown or wrong.
    """
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        given = record.get("format") if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"not a trajectory record: format is {given!r}, expected {FORMAT}")
    fields = {name: value for name, value in record.items() if name != "format"}
    try:
        fields["task"] = Task(**fields["task"])
        fields["prompt"] = tuple(Message(**message) for message in fields["prompt"])
        fields["tokens"] = tuple(fields["tokens"])
        fields["action_mask"] = tuple(bool(sampled) for sampled in fields["action_mask"])
        fields["logprobs"] = tuple(fields["logprobs"])
        fields["turns"] = tuple(Turn(**turn) for turn in fields["turns"])
        fields["outcome"] = Outcome(fields["outcome"])
        fields["versions"] = fields["versions"] and tuple(fields["versions"])
        trajectory = Trajectory(**fields)
        _check(trajectory)
        return trajectory
    except KeyError as error:
        raise ValueError(f"not a trajectory record: {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a trajectory record: {error}") from error


def _check(trajectory: Trajectory) -> None:
    """Raise ValueError if the parts don't fit together."""
    t, count = trajectory, len(trajectory.tokens)
    if not len(t.action_mask) == len(t.logprobs) == count:
        raise ValueError(f"{count} tokens, {len(t.action_mask)} in the mask, {len(t.logprobs)} log-probs")
    if not all(type(token) is int for token in t.tokens) or not all(isinstance(p, int | float) for p in t.logprobs):
        raise ValueError("tokens are integers, log-probs numbers")
    if not 0 <= t.prompt_length <= count or not all(0 <= turn.start <= turn.end <= count for turn in t.turns):
        raise ValueError("a span is outside of the tokens")
    texts = [t.task.id, t.task.env, t.task.split, t.error, *(m.content for m in t.prompt)]
    texts += [text for turn in t.turns for text in (turn.action, turn.observation)]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(turn.info, dict) for turn in t.turns):
        raise ValueError("something that is text has another type")
    if not isinstance(t.reward, int | float) or type(t.success) is not bool or type(t.seed) is not int:
        raise ValueError("reward, success or seed has another type")
    if t.versions is not None and (len(t.versions) != 2 or not all(type(version) is int for version in t.versions)):
        raise ValueError(f"versions are {t.versions}")
