"""The closing lines of a run: what it did, what it gained, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillsd.config import RunConfig
from skillsd.methods import method
from skillsd.report.progress import duration
from skillsd.report.tables import percent
from skillsd.report.writer import EVALUATIONS, METRICS, read
from skillsd.runs.lifecycle import load_config
from skillsd.training.health import health, summary_counts

Record = Mapping[str, Any]


def closing(folder: Path) -> list[str]:
    """The closing lines of the run in `folder`, from its files.

    Episodes, skills and taught groups; accuracy before and after on the held-out split, with its interval over tasks;
    a line for each finding of `skillsd.training.health`; where to look.

    Raises:
        UserError: if it is not a run's folder.
    """
    config = load_config(folder)
    records, evaluations = read(folder / METRICS), read(folder / EVALUATIONS)
    lines = [work(records, config)] if records else []
    lines += _gains(evaluations)
    lines += [f"warning: {finding}" for finding in health(records, config)]
    places = ["metrics.jsonl (docs/metrics.md)"]
    if config.log.trajectories_every:
        places.append("trajectories/")
    if method(config.method).uses_skills:
        places.append(f"skills: skillsd skills list {folder}")
    return [*lines, f"in {folder}/: {', '.join(places)}"]


def work(records: Sequence[Record], config: RunConfig) -> str:
    """Episodes, skills, and groups with a teacher, in words. `records` is not empty."""
    row, last = method(config.method), records[-1]
    parts = [f"{last['episodes']:,.0f} episodes in {last['iteration']} iterations, {duration(last['seconds'])}"]
    if row.uses_skills:
        counts = summary_counts(last)
        submitted, added = counts.pop("submitted"), counts.pop("added")
        without = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if count)
        parts.append(f"{added:,} skills from {submitted:,} trajectories{f' ({without})' if without else ''}")
    for what, metric, wanted in (
        ("with a teacher", "batch/groups_with_teacher", row.teacher != "none"),
        ("with a skill in the student's prompt", "batch/groups_with_context", row.student_prompt == "skill"),
        ("with a success to imitate", "batch/imitated", row.imitation_weight > 0),
    ):
        if wanted:
            count, groups = counted(records, config, metric)
            parts.append(f"{count:,} of {groups:,} groups {what}")
    return "; ".join(parts)


def counted(records: Sequence[Record], config: RunConfig, metric: str) -> tuple[int, int]:
    """Groups of a run from a metric that is a share of an iteration's groups, and the number of all groups."""
    groups = [_groups(record, config) for record in records]
    shares = [record.get(metric) or 0 for record in records]
    return sum(round(share * size) for share, size in zip(shares, groups, strict=True)), sum(groups)


def _groups(record: Record, config: RunConfig) -> int:
    return config.rollout.tasks_per_iteration - int(record.get("rollout/dropped_groups", 0))


def _gains(evaluations: Sequence[Record]) -> list[str]:
    """Accuracy at the first and at the last evaluation, sampled and, if measured, greedy."""
    lines = []
    for name, how in (("eval", ""), ("eval_greedy", ", greedy")):
        measured = [record for record in evaluations if f"{name}/accuracy" in record]
        if not measured:
            continue
        first, last = measured[0], measured[-1]
        before = _accuracy(first, name)
        after = f", after {last['episodes']:,.0f} episodes {_accuracy(last, name)}" if last is not first else ""
        where = f"{last[f'{name}/tasks']} {last[f'{name}/split']} tasks{how}"
        lines.append(f"accuracy [95 % over tasks] on {where}: before {before}{after}")
    return lines


def _accuracy(record: Record, name: str) -> str:
    accuracy = record[f"{name}/accuracy"]
    if accuracy is None:  # nan: no task could be played
        return "unknown"
    return percent(accuracy, record[f"{name}/interval"])
