"""Plot learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
LINES = ("-", "--", ":", "-.")

Records = Sequence[Mapping[str, Any]]


def learning_curves(
    runs: Mapping[str, Sequence[Records]], path: Path, *, title: str, split: str, base: float | None = None
) -> None:
    """Plot accuracy on `split` against episodes: a line per method for the mean over seeds, and thin lines per seed. A
    single run has a band instead: the 95 % interval over tasks.

    Args:
        runs: method -> the evaluation records of each of its runs.
        path: the PNG file.
        base: accuracy of the untrained model on the same split, for a horizontal line.
    """
    costs = {"episodes": "training episodes"}
    _picture(runs, path, costs, title=title, split=split, of="seeds", base=base)


def cost_curves(runs: Mapping[str, Sequence[Records]], path: Path, *, title: str, split: str, of: str = "runs") -> None:
    """Like `learning_curves`, against episodes and, in a second panel, against the wall-clock time of the training.

    Args:
        of: what the mean is over, in words.
    """
    costs = {"episodes": "training episodes", "seconds": "seconds of training (wall-clock)"}
    _picture(runs, path, costs, title=title, split=split, of=of)


def _picture(
    runs: Mapping[str, Sequence[Records]],
    path: Path,
    costs: Mapping[str, str],
    *,
    title: str,
    split: str,
    of: str,
    base: float | None = None,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, places = plt.subplots(
        1, len(costs), figsize=(7 * len(costs), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (cost, words) in zip(places[0], costs.items(), strict=True):
        for number, (method, measured) in enumerate(runs.items()):
            colour = COLOURS[number % len(COLOURS)]
            line = LINES[number // len(COLOURS) % len(LINES)]
            curves = [_points(records, cost) for records in measured]
            if len(curves) > 1:
                for points in curves:
                    axes.plot(*zip(*points.values(), strict=True), color=colour, linestyle=line, alpha=0.3, linewidth=1)
            for low, high in [_band(records, cost) for records in measured] if len(measured) == 1 else ():
                axes.fill_between(list(low), list(low.values()), list(high.values()), color=colour, alpha=0.12, lw=0)
            label = method if len(curves) == 1 else f"{method} (mean of {len(curves)} {of})"
            axes.plot(
                *_mean_curve(curves), color=colour, linestyle=line, marker="o", markersize=4, linewidth=2, label=label
            )
        if base is not None:
            axes.axhline(100 * base, color="gray", linestyle="--", linewidth=1, label="untrained base model")
        axes.set_xlabel(words)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    first = places[0][0]
    first.set_ylabel(f"accuracy on held-out tasks ({split}), %")
    first.set_ylim(bottom=0)
    if runs:
        first.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(records: Records, cost: str) -> dict[float, tuple[float, float]]:
    """Iteration -> (cost, accuracy in %). Evaluations without a finished episode have no accuracy and are skipped."""
    return {
        record.get("iteration", record["episodes"]): (float(record[cost]), 100 * float(record["eval/accuracy"]))
        for record in records
        if record["eval/accuracy"] is not None
    }


def _band(records: Records, cost: str) -> tuple[dict[float, float], dict[float, float]]:
    """Cost -> lower and upper end of the 95 % interval over tasks, in %. Records without an interval are skipped."""
    known = [record for record in records if record["eval/accuracy"] is not None and "eval/interval" in record]
    low, high = ({float(r[cost]): 100 * float(r["eval/interval"][end]) for r in known} for end in (0, 1))
    return low, high


def _mean_curve(curves: Sequence[Mapping[float, tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Mean cost and accuracy at the iterations at which all runs were evaluated."""
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = [[curve[iteration] for curve in curves] for iteration in common]
    return (
        [sum(x for x, _ in point) / len(point) for point in points],
        [sum(y for _, y in point) / len(point) for point in points],
    )
