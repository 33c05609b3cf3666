"""The Agent Trajectory Interchange Format of Harbor, version 1.7: a JSON file per episode.

https://github.com/harbor-framework/harbor/blob/main/rfcs/0001-trajectory-format.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillsd import __version__
from skillsd.files.write import make_folder, write_whole
from skillsd.runs.exports import NamedEpisode, clean
from skillsd.runs.opened import OpenRun


def write(run: OpenRun, episodes: Sequence[NamedEpisode], out: Path) -> str:
    make_folder(out)
    for episode in episodes:
        write_whole(out / f"{episode.name}.json", json.dumps(document(run, episode), allow_nan=False, indent=1))
    return ""


def document(run: OpenRun, episode: NamedEpisode) -> dict[str, Any]:
    """The ATIF document of an episode."""
    t = episode.episode.trajectory
    steps: list[dict[str, Any]] = [
        # A prompt's earlier replies are examples, not the agent's own work.
        {"source": message.role, "message": clean(message.content)}
        if message.role != "assistant"
        else {"source": "agent", "message": clean(message.content), "llm_call_count": 0}
        for message in t.prompt
    ]
    for turn, columns in zip(t.turns, episode.turns, strict=True):
        extra = {name: columns[name] for name in ("student_logprobs", "teacher_logprobs") if columns[name] is not None}
        steps.append(
            {
                "source": "agent",
                "message": clean(turn.action),
                "observation": {"results": [{"content": clean(turn.observation)}]},
                "metrics": {
                    "prompt_tokens": turn.start,
                    "completion_tokens": turn.end - turn.start,
                    "completion_token_ids": columns["tokens"],
                    "logprobs": columns["logprobs"],
                    **({"extra": extra} if extra else {}),
                },
            }
        )
    return {
        "schema_version": "ATIF-v1.7",
        "session_id": run.folder.name,
        "trajectory_id": f"{run.folder.name}/{episode.name}",
        "agent": {"name": "skillsd", "version": __version__, "model_name": run.config.model.name},
        "steps": [{"step_id": number, **step} for number, step in enumerate(steps, 1)],
        "final_metrics": {
            "total_prompt_tokens": sum(turn.start for turn in t.turns),
            "total_completion_tokens": t.action_tokens,
            "total_steps": len(steps),
        },
        "extra": {name: value for name, value in episode.facts.items() if value is not None},
    }
