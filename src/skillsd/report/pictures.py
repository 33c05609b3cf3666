"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


def learning_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path, *, title: str, split: str
) -> None:
    """Accuracy on the `split` panel against episodes: a line per method, its mean over seeds, and each seed thinly.

    Args:
        runs: method -> the evaluation records of each of its runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, (method, seeds) in zip(COLOURS, runs.items(), strict=False):
        points: dict[float, list[float]] = {}
        for measured in seeds:
            # Without a single whole episode there is no accuracy.
            records = [record for record in measured if record["eval/accuracy"] is not None]
            episodes = [float(record["episodes"]) for record in records]
            accuracies = [100 * float(record["eval/accuracy"]) for record in records]
            if len(seeds) > 1:
                axes.plot(episodes, accuracies, color=colour, alpha=0.3, linewidth=1)
            for x, y in zip(episodes, accuracies, strict=True):
                points.setdefault(x, []).append(y)
        xs = sorted(x for x, ys in points.items() if len(ys) == len(seeds))
        means = [sum(points[x]) / len(points[x]) for x in xs]
        label = method if len(seeds) == 1 else f"{method} (mean of {len(seeds)} seeds)"
        axes.plot(xs, means, color=colour, marker="o", markersize=4, linewidth=2, label=label)
    axes.set_xlabel("training episodes")
    axes.set_ylabel(f"accuracy on held-out tasks ({split}), %")
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
