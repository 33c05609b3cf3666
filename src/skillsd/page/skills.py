"""The fifth view: the bank by task, picks over iterations, what was refused, and uplift where it was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.errors import UserError
from skillsd.files.read import read_json_object
from skillsd.page.numbers import short, shorts
from skillsd.page.sample import MAX_SKILLS
from skillsd.runs.opened import OpenRun
from skillsd.skills.bank import StoredSkill
from skillsd.skills.ucb import ucb_score
from skillsd.training.health import summary_counts

UPLIFT = "uplift.json"
"""In a run's folder: the result of ``skillsd skills uplift RUN --json RUN/uplift.json``."""

_SOURCE = re.compile(r"iteration-(\d+)/(.+)/(\d+)")


def skills_view(run: OpenRun, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The bank; None for a method without skills."""
    stored = run.stored_skills
    counts = summary_counts(metrics[-1]) if metrics else {}
    submitted = counts.pop("submitted", 0)
    if not stored and not submitted:
        return None
    measured, summary = _uplift(run)
    shown = sorted(stored, key=lambda s: (-s.picks, s.id))[:MAX_SKILLS]
    totals = Counter(s.task_id for s in stored for _ in range(s.picks))
    c = run.config.skills.ucb_c
    return {
        "total": len(stored),
        "columns": {
            "id": [s.id for s in shown],
            "task": [s.task_id for s in shown],
            "success": [s.skill.success_analysis for s in shown],
            "mistake": [s.skill.mistake_analysis for s in shown],
            "workflow": [s.skill.golden_workflow for s in shown],
            "source": [_source(s.source) for s in shown],
            "source_outcome": [s.source_outcome.value for s in shown],
            "source_reward": shorts(s.source_reward for s in shown),
            "iteration": [s.iteration for s in shown],
            "picks": [s.picks for s in shown],
            "mean_reward": shorts(s.mean_reward for s in shown),
            "credited": [s.credited for s in shown],
            "score": [_score(s, totals[s.task_id], c) for s in shown],
            "uplift": [measured.get(s.id) for s in shown],
        },
        "rule": run.config.skills.pick,
        "credit": run.config.skills.credit,
        "ucb_c": short(c),
        "summaries": {"submitted": submitted, **counts},
        "uplift": summary,
    }


def _score(skill: StoredSkill, total: int, c: float) -> float | None:
    """UCB's score; None for a skill that was never picked, which comes first whatever its score."""
    found: float | None = short(ucb_score(skill.mean_reward, skill.picks, total, c)) if skill.picks else None
    return found


def _source(text: str) -> list[Any] | str:
    """[iteration, task, member] of the episode that a skill was written from; the text if it is something else."""
    found = _SOURCE.fullmatch(text)
    return [int(found[1]), found[2], int(found[3])] if found else text


def _uplift(run: OpenRun) -> tuple[dict[int, list[Any]], dict[str, Any] | None]:
    """Skill id -> [success with it, success without it, episodes], and the mean with its interval over tasks."""
    path = run.folder / UPLIFT
    if not path.is_file():
        return {}, None
    remedy = f"measure it again: skillsd skills uplift {run.folder} --json {path}"
    record = read_json_object(path, remedy, ("skills", "summary", "iteration"))
    try:
        by_skill = {
            int(skill["id"]): [
                *(short(skill["uplift"][f"success_{side}"]) for side in ("with", "without")),
                skill["uplift"]["episodes"],
            ]
            for skill in record["skills"]
        }
        every = record["summary"]["all"]
        mean, interval = short(every["success"]), shorts(every["success_interval"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a measured uplift ({error}): {remedy}") from error
    about = {"iteration": record["iteration"], "tasks": every.get("tasks"), "skills": every.get("skills")}
    return by_skill, {"mean": mean, "interval": interval, **about}
