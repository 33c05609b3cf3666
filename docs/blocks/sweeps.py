"""Tables of `skillsd demo` and of sweeps by `skillsd table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from blocks.common import percent, points, results, table
from skillsd.sweeps.results import Estimate, Measured, difference, estimate
from skillsd.sweeps.variants import BASE

BUDGETS = ("1536", "3072")
AGAINST = "grpo"
FIGURES = ("accuracy", "greedy_accuracy")
DEMO = {
    "base": ("the untrained base model", "base", "base"),
    "grpo": ("GRPO", "grpo", "grpo"),
    "imitation": ("GRPO + self-imitation", "grpo-imitation", None),
    "skill-sd": ("Skill-SD (rulebook: with a frozen teacher)", "skill-sd-frozen", "skill-sd"),
}
"""Row -> its name, and its method in each part of the demo."""


def demo() -> str:
    found = results("demo")
    rows = [
        [name, _demo_cell(found["rulebook"], one), _demo_cell(found["sokoban"], two)]
        for name, one, two in DEMO.values()
    ]
    return table(["accuracy on held-out tasks", "rulebook", "Sokoban"], rows)


def _demo_cell(part: dict[str, Any], method: str | None) -> str:
    """Mean, interval over seeds and the seeds' values."""
    if method is None:
        return "-"
    row = part[method]
    low, high = map(percent, row["interval"])
    return f"{percent(row['accuracy'])} % [{low}, {high}] ({', '.join(map(percent, row['accuracy_by_seed']))})"


def cells(sweep: str, budget: str, method: str) -> list[Measured]:
    """A method's cells at a budget, with one result each: the mean over the tasks.

    The JSON is rounded to four digits; its means and intervals would be rounded a second time in the page. An accuracy
    is a multiple of 1 / tasks, so it can be restored exactly, and the statistics are computed from that.
    """
    found = results("sokoban")["tables"][sweep]
    tasks = found["tasks"]

    def exact(share: float) -> tuple[float]:
        return (round(share * tasks) / tasks,)

    return [
        Measured(
            model=model,
            method=method,
            seed=int(seed),
            accuracy=exact(accuracy),
            completion=exact(row["completion_by_seed"][seed]),
            greedy_accuracy=exact(row["greedy_accuracy_by_seed"][seed]),
        )
        for model, row in found["budgets"][budget][method]["by_model"].items()
        for seed, accuracy in row["accuracy_by_seed"].items()
    ]


def methods_by_budget(sweep: str, *, base: bool = True) -> str:
    """Accuracy of each method and its difference to GRPO, for each budget.

    Args:
        base: include the untrained base model.
    """
    found = results("sokoban")["tables"][sweep]
    columns = ["method"]
    for budget in BUDGETS:
        columns += [f"{int(budget):,} episodes: sampled", "greedy", "minus GRPO, sampled", "greedy"]
    rows = []
    for method in found["budgets"][BUDGETS[0]]:
        if method == BASE and not base:
            continue
        row = [f"`{method}`"]
        for budget in BUDGETS:
            ours, theirs = cells(sweep, budget, method), cells(sweep, budget, AGAINST)
            row += [_shown(estimate(ours, figure, "models")) for figure in FIGURES]
            if method == AGAINST:
                row += ["-"] * len(FIGURES)
            else:
                row += [_shown(difference(ours, theirs, figure, "models"), points) for figure in FIGURES]
        rows.append(row)
    return table(columns, rows)


def difference_by_base(sweep: str) -> str:
    """Difference to GRPO in sampled accuracy, on each base model after the largest budget."""
    found = results("sokoban")["tables"][sweep]
    budget = BUDGETS[-1]
    rows = []
    for method in found["budgets"][budget]:
        if method not in (BASE, AGAINST):
            both = [cells(sweep, budget, name) for name in (method, AGAINST)]
            on_each = ([[cell for cell in of if cell.model == model] for of in both] for model in found["models"])
            shown = [_shown(difference(ours, theirs, "accuracy", "seeds"), points) for ours, theirs in on_each]
            rows.append([f"`{method}`", *shown])
    return table(["method", *found["models"]], rows)


def _shown(found: Estimate | None, form: Callable[[float, Sequence[float] | None], str] = percent) -> str:
    return form(found.mean, found.interval) if found else "-"


RENDERERS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "sokoban-main": partial(methods_by_budget, "main"),
    "sokoban-main-by-base": partial(difference_by_base, "main"),
    "sokoban-main-64": partial(methods_by_budget, "main-64"),
    "sokoban-rows": partial(methods_by_budget, "rows", base=False),
    "sokoban-content": partial(methods_by_budget, "content", base=False),
    "sokoban-hard": partial(methods_by_budget, "hard"),
    "sokoban-hard-by-base": partial(difference_by_base, "hard"),
}
