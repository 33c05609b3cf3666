"""Trajectories as JSON and back without loss, for ``trajectories/*.jsonl`` and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skillsd.types import Message, Outcome, Task, Trajectory, Turn

FORMAT = 2


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """A record of plain dicts, lists, numbers and strings; `json.dumps` turns it into one line."""
    task = trajectory.task
    return {
        "format": FORMAT,
        "task": {
            "id": task.id,
            "env": task.env,
            "split": task.split,
            "payload": dict(task.payload),
            "difficulty": task.difficulty,
        },
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
        return Trajectory(**fields)
    except KeyError as error:
        raise ValueError(f"not a trajectory record: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a trajectory record: {error}") from error
