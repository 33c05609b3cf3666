"""A report as JSON: a light part, and one compressed chunk for each iteration whose episodes are shown."""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skillsd import __version__
from skillsd.errors import UserError
from skillsd.files.lock import is_locked
from skillsd.page import curves, sample
from skillsd.page.episodes import INDEX, chunk, index_rows
from skillsd.page.numbers import short
from skillsd.page.overview import overview
from skillsd.page.skills import skills_view
from skillsd.page.subject import LabelledRun, Subject
from skillsd.page.table import table_view
from skillsd.report.writer import EVALUATIONS, read
from skillsd.runs.folder import LOCK

Record = Mapping[str, Any]


@dataclass
class Report:
    """The content of a page.

    Attributes:
        light: what the page holds from the start; JSON-serialisable.
        chunks: name -> an iteration's episodes (`skillsd.page.episodes.chunk`): JSON, gzip, base64.
    """

    light: dict[str, Any] = field(default_factory=dict)
    chunks: dict[str, str] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether a run is still training, or the table is being made."""
        return bool(self.light["running"])


def build(
    subject: Subject,
    *,
    episodes: int = sample.MAX_EPISODES,
    reload_seconds: int | None = None,
    on_iteration: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read the runs of a report.

    Args:
        episodes: at most so many are shown, all runs together.
        reload_seconds: the page loads itself anew after this time, since it is written again and again.
        on_iteration: called with the number of iterations that are done, and their total.

    Raises:
        UserError: if a run's metrics, evaluations or bank are damaged. Damaged episodes are left out, with a note.
    """
    report = Report()
    records = [labelled.run.metrics for labelled in subject.runs]
    share = len(subject.runs)
    plans = [
        _plan(labelled, metrics, episodes // share, sample.MAX_TOKENS // share)
        for labelled, metrics in zip(subject.runs, records, strict=True)
    ]
    total, done, runs = sum(map(len, plans)), 0, []
    for place, (labelled, metrics, plan) in enumerate(zip(subject.runs, records, plans, strict=True)):

        def count(finished: int, before: int = done) -> None:
            on_iteration(before + finished, total)

        runs.append(_run(report, place, labelled, metrics, plan, count))
        done += len(plan)
    training = any(run["state"]["name"] == "running" for run in runs)
    running = training or is_locked(subject.folder / LOCK)
    report.light = {
        "title": subject.folder.resolve().name,
        "is_table": subject.is_table,
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "version": __version__,
        "running": running,
        "reload": reload_seconds if running else None,
        "runs": runs,
        "means": curves.means([(label, made["series"]) for label, made in zip(subject.runs, runs, strict=True)]),
        "table": table_view(subject),
    }
    return report


def _plan(labelled: LabelledRun, metrics: Sequence[Record], episodes: int, tokens: int) -> list[int]:
    """The iterations of a run to show."""
    before, sizes = 0.0, {}
    for record in metrics:
        count = record["episodes"] - before
        before = record["episodes"]
        sizes[int(record["iteration"])] = (int(count), int(count * (record.get("rollout/tokens") or 0)))
    written = {n: sizes[n] for n in labelled.run.iterations_with_trajectories if n in sizes}
    return sample.sampled(written, episodes=episodes, tokens=tokens)


def _run(
    report: Report,
    place: int,
    labelled: LabelledRun,
    metrics: Sequence[Record],
    plan: Sequence[int],
    on_iteration: Callable[[int], None],
) -> dict[str, Any]:
    run = labelled.run
    evaluations = read(run.folder / EVALUATIONS)
    rows: list[list[Any]] = []
    shown: list[dict[str, Any]] = []
    missing: list[str] = []
    for count, iteration in enumerate(plan, 1):
        try:
            groups = list(run.groups(iteration))
            content = chunk(groups, run.objective(iteration), run.picture)
        except UserError as error:
            missing.append(str(error))
            continue
        name = f"{place}-{iteration}"
        report.chunks[name] = _packed(content)
        shown.append({"iteration": iteration, "chunk": name, "groups": len(groups)})
        rows += index_rows(groups)
        on_iteration(count)
    finished = int(metrics[-1]["iteration"]) if metrics else 0
    recorded = [n for n in run.iterations_with_trajectories if n <= finished]  # the others are being written
    rule = sample.in_words(plan, recorded, finished, run.config.log.trajectories_every)
    return {
        "label": f"{labelled.method}, seed {labelled.seed}",
        "method": labelled.method,
        "model": labelled.model,
        "seed": labelled.seed,
        "folder": str(run.folder),
        **overview(labelled, metrics, evaluations),
        "series": {
            "metrics": curves.metric_columns(metrics),
            "evaluations": curves.evaluation_columns(evaluations),
        },
        "iterations": shown,
        "sampling": rule,
        "missing": list(dict.fromkeys(missing)),
        "episodes": _index(rows),
        "skills": skills_view(run, metrics),
        "lambda": short(metrics[-1].get("loss/lambda_sdl")) if metrics else None,
    }


def _index(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The index as columns; tasks and outcomes as numbers of a list each."""
    columns: dict[str, Any] = {name: [row[place] for row in rows] for place, name in enumerate(INDEX)}
    for name in ("task", "outcome"):
        names = list(dict.fromkeys(columns[name]))
        number = {text: place for place, text in enumerate(names)}
        columns[name] = [number[text] for text in columns[name]]
        columns[f"{name}s"] = names
    columns["success"] = [int(value) for value in columns["success"]]
    return columns


def _packed(content: Mapping[str, Any]) -> str:
    # mtime=0: the same content gives the same bytes.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()
