"""`skillsd report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from skillsd.cli.common import check_writable, console, errors

if TYPE_CHECKING:
    from skillsd.page.data import Report


def add_to(app: typer.Typer) -> None:
    app.command()(report)


def report(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|TABLE", help="The folder of a run, of `skillsd table` or of `skillsd demo`.")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The HTML file.", show_default="report.html in that folder"),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again and again while a run goes on.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Seconds between the reports of --watch.")] = 15,
    md: Annotated[
        bool, typer.Option("--md", help="Print a summary in Markdown instead, e.g. for a pull request.")
    ] = False,
    episodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Show at most so many episodes, all runs together.", show_default="5000"),
    ] = None,
) -> None:
    """Write a run or a table as one HTML page.

    It holds curves, episodes, what the teacher made of each token, and the skills. It opens from the disk, without a
    server or a network.
    """
    from skillsd.page.sample import MAX_EPISODES
    from skillsd.page.write import watch as keep_writing
    from skillsd.page.write import write_report
    from skillsd.report.progress import Bars

    if md:
        from skillsd.page.data import build
        from skillsd.page.markdown import summary
        from skillsd.page.subject import open_subject

        console.print(summary(build(open_subject(target), episodes=0)), highlight=False, soft_wrap=True, end="")
        return
    if out:
        check_writable(out)
    limit = episodes or MAX_EPISODES
    if not watch:
        bars = Bars(console)
        with bars.shown():
            made = write_report(
                target, out, episodes=limit, on_iteration=lambda done, total: bars.update("iterations", done, total)
            )
        written(*made)
        return
    console.print(f"Writing it every {every} s until the run ends (Ctrl-C stops this, not the run)", highlight=False)
    keep_writing(target, out, every=every, episodes=limit, on_written=written)


def write_at_end(folder: Path) -> None:
    """The report of a run or a table that has just ended. If it can't be written, that is a note, not an error."""
    from skillsd.errors import UserError
    from skillsd.page.write import write_report

    try:
        path, _ = write_report(folder)
    except UserError as error:
        console.print(f"note: no report was written: {error}", highlight=False, soft_wrap=True)
    else:
        console.print(f"report: {path}  (open it in a browser)", highlight=False, soft_wrap=True)


def written(path: Path, made: Report) -> None:
    """Name the file, its size, and what is not in it."""
    runs = made.light["runs"]
    shown = sum(len(run["episodes"]["iteration"]) for run in runs)
    size = path.stat().st_size / 1e6
    console.print(f"{path}: {shown:,} episodes, {size:.1f} MB", highlight=False, soft_wrap=True)
    for run in runs:
        for text in run["missing"]:
            errors.print(f"note: {run['label']}: {text}", highlight=False, soft_wrap=True)
