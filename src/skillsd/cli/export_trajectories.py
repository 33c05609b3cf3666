"""`skillsd export-trajectories`: recorded episodes for other viewers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from skillsd.cli.common import RunFolder, check_writable, console
from skillsd.errors import UserError, unknown_name


def add_to(app: typer.Typer) -> None:
    app.command("export-trajectories")(export_trajectories)


def export_trajectories(
    run: RunFolder,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="inspect, atif, jsonl or trackio.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Output file; for atif a folder.", show_default="in the run's folder, under exports/"),
    ] = None,
    iteration: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=1, help="Export this iteration; can be repeated.", show_default="all that were written"),
    ] = None,
) -> None:
    """Export recorded episodes for other tools.

    For Inspect's viewer, as ATIF (Harbor), as JSON lines, or as traces for Trackio.
    """
    from skillsd.files.write import make_folder
    from skillsd.runs.exports import FORMATS, named_episodes
    from skillsd.runs.opened import open_run

    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    opened, form = open_run(run), FORMATS[to]
    if form.default is None and out is not None:
        raise UserError(f"--out is {str(out)!r}, but {to} keeps its data in a folder of its own ($TRACKIO_DIR)")
    if out is not None and form.folder and out.exists() and not out.is_dir():
        raise UserError(f"--out is the file {str(out)!r}, but {to} needs a folder: it writes a file per episode")
    if out is not None and not form.folder:
        check_writable(out)
    write = form.write
    iterations = sorted(set(iteration or opened.iterations_with_trajectories))
    episodes = list(named_episodes(opened, iterations))
    if not episodes:
        raise UserError(
            f"{str(run)!r} has no episodes to export: none were written (log.trajectories_every), or none yet"
        )
    target = out or run / "exports" / (form.default or "")
    if out is None and form.default is not None:
        make_folder(target.parent)
    hint = write(opened, episodes, target)
    where = to if form.default is None else str(target)
    what = f"{len(episodes):,} episodes of {len(iterations)} iterations -> {where}"
    console.print(what + (f"  (next: {hint})" if hint else ""), highlight=False, soft_wrap=True)
