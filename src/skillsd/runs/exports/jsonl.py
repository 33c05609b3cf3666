"""JSON lines: an episode per line, with the dialogue, token ids, and log-probs by turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from skillsd.files.write import write_whole
from skillsd.runs.exports import NamedEpisode
from skillsd.runs.opened import OpenRun


def write(run: OpenRun, episodes: Sequence[NamedEpisode], out: Path) -> str:
    lines = (
        json.dumps({**e.facts, "messages": e.messages, "tokens_by_turn": e.turns}, allow_nan=False) for e in episodes
    )
    write_whole(out, "".join(f"{line}\n" for line in lines))
    return ""
