"""The engine's tasks and the folds of their variations. Facts about ScienceWorld 1.2.3; a slow test compares them."""

from __future__ import annotations

TASKS: dict[str, tuple[int, int]] = {
    "boil": (30, 39),
    "change-the-state-of-matter-of": (30, 26),
    "chemistry-mix": (32, 22),
    "chemistry-mix-paint-secondary-color": (36, 21),
    "chemistry-mix-paint-tertiary-color": (36, 28),
    "find-animal": (300, 10),
    "find-living-thing": (300, 10),
    "find-non-living-thing": (300, 5),
    "find-plant": (300, 10),
    "freeze": (30, 26),
    "grow-fruit": (126, 77),
    "grow-plant": (126, 63),
    "identify-life-stages-1": (14, 41),
    "identify-life-stages-2": (10, 16),
    "inclined-plane-determine-angle": (168, 55),
    "inclined-plane-friction-named-surfaces": (1386, 51),
    "inclined-plane-friction-unnamed-surfaces": (162, 178),
    "lifespan-longest-lived": (125, 6),
    "lifespan-longest-lived-then-shortest-lived": (125, 7),
    "lifespan-shortest-lived": (125, 6),
    "measure-melting-point-known-substance": (436, 27),
    "measure-melting-point-unknown-substance": (300, 32),
    "melt": (30, 34),
    "mendelian-genetics-known-plant": (120, 142),
    "mendelian-genetics-unknown-plant": (480, 144),
    "power-component": (20, 11),
    "power-component-renewable-vs-nonrenewable-energy": (20, 26),
    "test-conductivity": (900, 21),
    "test-conductivity-of-unknown-substances": (600, 21),
    "use-thermometer": (540, 22),
}
"""Task -> its number of variations, and the length of the engine's solution of the first one, in commands."""


def folds(name: str) -> dict[str, range]:
    """The variations of a task by fold: half of them, a quarter, and the rest, in order."""
    count = TASKS[name][0]
    quarter = count // 4
    ends = (0, 2 * quarter, 3 * quarter, count)
    return {fold: range(*ends[place : place + 2]) for place, fold in enumerate(("train", "dev", "test"))}
