"""Count the held-out levels that are the same puzzle as a training level, in the panels of a commit or of today.

    python studies/sokoban/near_copies.py [COMMIT]      # e.g. 6066df0, the last one with the old panels

The same puzzle: equal by today's `Level.id`, i.e. at most shifted, turned, mirrored, or with another starting place
within the area that the player can walk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from skillsd.envs.sokoban.board import Level
from skillsd.envs.sokoban.levels import PANELS
from skillsd.envs.sokoban.presets import PRESETS

Panels = dict[tuple[str, str], list[str]]
"""(preset, split) -> ids of its levels, computed anew from their rows."""

TRAIN = "train"


def read(commit: str | None) -> Panels:
    """The panels of a commit; None: those in the working tree."""
    root = Path(__file__).parents[2]
    found: Panels = {}
    for preset in PRESETS:
        path = PANELS / f"{preset}.json"
        if commit is None:
            content = path.read_text(encoding="utf-8")
        else:
            name = f"{commit}:{path.relative_to(root)}"
            content = subprocess.run(["git", "show", name], cwd=root, capture_output=True, text=True, check=True).stdout
        for split, rows in json.loads(content).items():
            found[preset, split] = [Level.from_rows(row["rows"]).id for row in rows]
    return found


def count(panels: Panels) -> list[list[object]]:
    """A row per held-out split: its levels, how many of them are in its own ``train``, in any preset's ``train``, or in
    another held-out split, and how many occur before in the same split."""
    train = {id_ for (_, split), ids in panels.items() if split == TRAIN for id_ in ids}
    rows: list[list[object]] = []
    for (preset, split), ids in panels.items():
        if split == TRAIN:
            continue
        own = set(panels[preset, TRAIN])
        others = {id_ for key, theirs in panels.items() if key != (preset, split) and key[1] != TRAIN for id_ in theirs}
        again = sum(times - 1 for times in Counter(ids).values())
        found = [sum(id_ in those for id_ in ids) for those in (own, train, others)]
        rows.append([f"{preset}/{split}", len(ids), *found, again])
    return rows


def main() -> None:
    if len(sys.argv) > 2 or "-h" in sys.argv or "--help" in sys.argv:
        sys.exit(__doc__)
    columns = ["split", "levels", "in its train", "in any train", "in other held-out splits", "repeats in the split"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in count(read(sys.argv[1] if len(sys.argv) == 2 else None)):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
