"""Traces of Trackio, for ``trackio show``: a trace per episode, in the step of its iteration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trackio

from skillsd.report.writer import silent
from skillsd.runs.exports import NamedEpisode
from skillsd.runs.opened import OpenRun


def write(run: OpenRun, episodes: Sequence[NamedEpisode], out: Path) -> str:
    project = run.config.log.trackio or run.config.name
    with silent():
        trackio.init(
            project=project,
            name=f"{run.folder.name}-trajectories",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        for episode in episodes:
            trace = trackio.Trace(messages=episode.messages, metadata=episode.facts)
            trackio.log({"episode": trace}, step=episode.group.iteration)
        trackio.finish()
    return f"trackio show --project {project}"
