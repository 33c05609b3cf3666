"""Write a report once, or again and again while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from skillsd.files.write import write_whole
from skillsd.page import html, sample
from skillsd.page.data import Report, build
from skillsd.page.subject import open_subject

REPORT = "report.html"
"""The file in the folder of a run or a table, if no other is given."""


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    episodes: int = sample.MAX_EPISODES,
    reload_seconds: int | None = None,
    on_iteration: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, Report]:
    """Write the report of a run or a table; returns its file. It replaces an earlier one only when it is complete.

    Args:
        folder: of the run or the table.
        out: the file; `REPORT` in the folder if None.
        episodes, reload_seconds, on_iteration: see `skillsd.page.data.build`.

    Raises:
        UserError: if the folder holds neither, its records are damaged, or the file can't be written.
    """
    report = build(open_subject(folder), episodes=episodes, reload_seconds=reload_seconds, on_iteration=on_iteration)
    path = out or folder / REPORT
    write_whole(path, html.page(report))
    return path, report


def watch(
    folder: Path,
    out: Path | None,
    *,
    every: int,
    episodes: int = sample.MAX_EPISODES,
    on_written: Callable[[Path, Report], None] = lambda path, report: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write the report every so many seconds until no run in the folder is training any more.

    The last one is written after the end, so it is complete and no longer loads itself anew.
    """
    while True:
        path, report = write_report(folder, out, episodes=episodes, reload_seconds=every)
        on_written(path, report)
        if not report.running:
            return
        sleep(every)
