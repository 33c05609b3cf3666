"""Presets: level distributions with their panels and episode rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Style = Literal["terse", "objects", "grid"]
STYLES: tuple[Style, ...] = ("terse", "objects", "grid")


@dataclass(frozen=True)
class Preset:
    """A distribution of levels, the panels drawn from it, and the rules of an episode.

    Attributes:
        height, width: size of the room in cells, including its border of walls.
        boxes: number of boxes (and of targets).
        max_steps: maximum moves in an episode, counting blocked and invalid ones.
        shortest, longest: range of the optimal solution's length in moves.
        min_pushes: minimum number of pushes in the optimal solution.
        min_walls, max_walls: range of the number of inner walls, drawn uniformly. Rooms without inner walls are
            excluded: they allow so few levels that the panels would exhaust them.
        splits: number of levels by split.
        style: prompt style; see `skillsd.envs.sokoban.language`.
        max_actions_per_turn: maximum moves in one turn.
        source: where the settings come from.
    """

    height: int
    width: int
    boxes: int
    max_steps: int
    shortest: int
    longest: int
    min_pushes: int
    min_walls: int
    max_walls: int
    splits: Mapping[str, int]
    style: Style
    max_actions_per_turn: int
    source: str


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "nano": Preset(
            height=6,
            width=6,
            boxes=1,
            max_steps=20,
            shortest=6,
            longest=14,
            min_pushes=3,
            min_walls=2,
            max_walls=5,
            splits={"train": 96, "tune": 256, "test": 512},
            style="terse",
            max_actions_per_turn=1,
            source="our own: the smallest task on which a tiny model shows the paper's ordering",
        ),
        "nano-hard": Preset(
            height=6,
            width=6,
            boxes=1,
            max_steps=20,
            shortest=10,
            longest=16,
            min_pushes=2,
            min_walls=2,
            max_walls=5,
            # Rooms of 6x6 with one box and 2 to 5 inner walls allow about 3,300 different puzzles whose solutions have
            # 6 to 16 moves. nano and nano-hard take 1,504 of them; the warm start's demonstrations need the rest.
            splits={"train": 256, "tune": 128, "test": 256},
            style="terse",
            max_actions_per_turn=1,
            source="our own: nano with longer solutions, where a plain base model rarely succeeds",
        ),
        "paper": Preset(
            height=6,
            width=6,
            boxes=2,
            max_steps=40,
            shortest=6,
            longest=30,
            min_pushes=4,
            min_walls=2,
            max_walls=4,
            splits={"train": 96, "tune": 128, "test": 64, "test512": 512},
            style="grid",
            max_actions_per_turn=1,
            # From the paper: room size, boxes, steps, sizes of train and test. Our choices, where it is silent:
            # solution lengths, pushes, walls, prompt wording, one move per turn. test512 is also ours, because 64
            # levels leave a standard error of about 6 points.
            source="arXiv 2604.10674, section on Sokoban; no code is public",
        ),
        "ragen": Preset(
            height=6,
            width=6,
            boxes=1,
            max_steps=10,
            shortest=2,
            longest=10,
            min_pushes=1,
            min_walls=2,
            max_walls=6,
            splits={"train": 96, "tune": 64, "test": 128},
            style="grid",
            max_actions_per_turn=5,
            # SimpleSokoban: dim 6x6, num_boxes 1, max_actions_per_traj 10 (config/envs.yaml),
            # max_actions_per_turn 5 (config/base.yaml; its max_turn 5 has no counterpart here). RAGEN doesn't limit
            # the solution's length; we limit it to the move budget so that every level is solvable.
            source="RAGEN-AI/RAGEN config/envs.yaml (SimpleSokoban) and config/base.yaml; our levels",
        ),
        "verl-agent": Preset(
            height=6,
            width=6,
            boxes=1,
            max_steps=15,
            shortest=2,
            longest=15,
            min_pushes=1,
            min_walls=2,
            max_walls=6,
            splits={"train": 96, "tune": 64, "test": 128},
            style="grid",
            max_actions_per_turn=1,
            # env.max_steps=15 (in the script); dim_room [6, 6], num_boxes 1 (the defaults of its environment).
            source="verl-agent examples/gigpo_trainer/run_sokoban.sh; our levels",
        ),
    }
)
"""The presets by name. Panels are drawn in this order; each excludes the puzzles of the earlier ones."""
