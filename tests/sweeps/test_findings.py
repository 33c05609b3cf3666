"""What a table says of runs in which nothing was learnt, or a method's own part did nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from synthetic import fill

from skillsd.sweeps.findings import findings, in_words, warnings
from skillsd.sweeps.plan import Cell, Sweep
from skillsd.sweeps.table import show_plan, write

SILENT = {"batch/groups_with_context": 0.0, "batch/groups_with_teacher": 0.0, "summaries/submitted": 9,
          "summaries/added": 9, "skills/skills": 9}  # fmt: skip


def by_method(cell: Cell, iteration: int | None) -> tuple[list[float], list[float]]:
    """Different results for base, grpo and skill-sd."""
    solved = [float(i < ("base", "grpo", "skill-sd").index(cell.method)) for i in range(3)]
    return solved, solved


def equal(cell: Cell, iteration: int | None) -> tuple[list[float], list[float]]:
    """skill-sd as grpo, apart from the seed."""
    solved = [0.0, float(cell.method == "base"), float(cell.seed == 1)]
    return solved, solved


def in_state(sweep: Sweep, state: dict[str, Any], where: Callable[[Cell], bool]) -> None:
    """Add metrics to the runs' records."""
    for cell in sweep.cells:
        if cell.trained and where(cell):
            path = cell.folder / "metrics.jsonl"
            lines = [json.dumps({**json.loads(line), **state}) + "\n" for line in path.read_text().splitlines()]
            path.write_text("".join(lines))


def shown(sweep: Sweep) -> tuple[str, dict[str, Any]]:
    console = Console(record=True, width=400, file=io.StringIO())
    return (write(sweep, console), console.export_text())[::-1]  # type: ignore[return-value]


def test_different_rows_of_healthy_runs_have_no_findings(make_sweep: Any) -> None:
    sweep = make_sweep(seeds=range(2))
    fill(sweep, by_method)
    assert findings(sweep) == []
    assert "arning" not in shown(sweep)[0]


def test_a_table_names_equal_rows_and_why_they_are_equal(make_sweep: Any) -> None:
    sweep = make_sweep(seeds=range(2))
    fill(sweep, equal)
    in_state(sweep, SILENT, lambda cell: cell.method == "skill-sd")
    silent, same = findings(sweep)
    assert (silent["method"], silent["name"], len(silent["cells"]), silent["runs"]) == ("skill-sd", "no_teacher", 2, 2)
    assert "curriculum.tasks" in silent["cure"]
    assert (same["method"], same["name"], len(same["cells"])) == ("skill-sd", "equal_rows", 2)
    assert same["text"] == "every result equals that of grpo, to the digit"
    assert same["cure"] == "This follows from the warning above"
    text, summary = shown(sweep)
    assert summary["findings"] == [silent, same]
    for finding in summary["findings"]:
        assert in_words(finding) in text
        assert in_words(finding) in (sweep.out / "table.md").read_text()
    assert json.loads((sweep.out / "table.json").read_text())["findings"] == summary["findings"]


def test_equal_rows_without_another_finding(make_sweep: Any) -> None:
    sweep = make_sweep()
    fill(sweep, lambda cell, iteration: ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]))
    assert [(f["method"], f["text"], f["cure"]) for f in findings(sweep)] == [
        ("grpo", "every result equals that of base, to the digit", "No setting in which they differ had an effect"),
        ("skill-sd", "every result equals that of base, to the digit", "No setting in which they differ had an effect"),
    ]
    assert findings(sweep, {sweep.cells[0].name})[0]["method"] == "skill-sd"


def test_rows_that_differ_in_one_seed_or_at_one_budget_are_not_equal(make_sweep: Any) -> None:
    sweep = make_sweep(seeds=range(2), episodes=[24, 72])
    names = {f["name"] for f in findings(sweep)}
    assert names == set()

    def one_differs(cell: Cell, iteration: int | None) -> tuple[list[float], list[float]]:
        solved = equal(cell, iteration)[0]
        if cell.method == "skill-sd" and cell.seed == 1 and iteration == 2:
            solved = [1.0, 1.0, 1.0]
        return solved, solved

    fill(sweep, one_differs)
    assert findings(sweep) == []


def test_a_finding_in_some_runs_is_counted(make_sweep: Any) -> None:
    sweep = make_sweep(seeds=range(3))
    fill(sweep, by_method)
    in_state(sweep, {"batch/zero_advantage_groups": 1.0}, lambda cell: cell.method == "grpo" and cell.seed == 2)
    [finding] = findings(sweep)
    assert f"grpo (1 of 3 runs; {finding['cells'][0]}): the rewards of every group were equal" in in_words(finding)
    assert findings(sweep, finding["cells"]) == []


@pytest.mark.parametrize(("iterations", "warned"), [(1, True), (6, False)])
def test_a_plan_warns_of_runs_that_visit_no_task_twice(make_sweep: Any, iterations: int, warned: bool) -> None:
    sweep = make_sweep(f"training.iterations={iterations}", seeds=range(2))
    console = Console(record=True, width=400, file=io.StringIO())
    show_plan(sweep, console)
    assert ("warning: skill-sd: no task will come twice" in console.export_text()) == warned
    assert len(warnings(sweep)) == warned  # once for both seeds
