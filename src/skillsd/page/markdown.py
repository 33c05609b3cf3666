"""A report's short form, for a pull request: `skillsd report --md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.page.data import Report
from skillsd.report.progress import duration
from skillsd.report.tables import percent

MAX_RUNS = 40


def summary(report: Report) -> str:
    """The facts, the gains and the state of health of a run; of a table, its figures and the findings of its runs."""
    light = report.light
    lines = [f"### {_plain(light['title'])}", ""]
    if light["table"]:
        lines += _table(light["table"])
        lines += _runs(light["runs"])
    else:
        lines += _run(light["runs"][0])
    return "\n".join(lines).rstrip() + "\n"


def _run(run: Mapping[str, Any]) -> list[str]:
    facts = dict(run["facts"])
    kept = ("method", "model", "environment", "seed", "commit")
    state = _plain(run["state"]["text"])
    lines = [f"{state[:1].upper()}{state[1:]}. {_plain(run['work'])}.", ""]
    lines += _rows(["", ""], [[name, _plain(facts[name])] for name in kept])
    for gain in run["accuracy"]:
        where = f"{gain['tasks']} tasks of {_plain(str(gain['split']))}"
        rows = [
            [name, _accuracy(gain[name]), f"{gain[name]['episodes']:,.0f}"]
            for name in ("before", "after")
            if gain[name] is not None
        ]
        lines += ["", *_rows([f"accuracy, {gain['how']} [95 % over {where}]", "", "episodes"], rows)]
    lines += ["", *(_finding(finding) for finding in run["health"])]
    return lines


def _table(table: Mapping[str, Any]) -> list[str]:
    lines = []
    for budget in table["budgets"]:
        lines += [
            f"After {budget['episodes']:,} episodes, {table['tasks']} tasks of {_plain(str(table['split']))}:",
            "",
        ]
        columns = [
            "method",
            "accuracy [95 %]",
            "difference, points",
            "completion [95 %]",
            "greedy [95 %]",
            "runs",
            "time",
        ]
        lines += [*_rows(columns, [_table_row(row, table["against"]) for row in budget["rows"]]), ""]
    if table.get("missing"):
        lines += [table["missing"], ""]
    return [*lines, *(f"- {_plain(note)}" for note in table.get("notes", ()))]


def _table_row(row: Mapping[str, Any], against: str) -> list[str]:
    pairs = (("accuracy", "interval"), ("completion", "completion_interval"), ("greedy_accuracy", "greedy_interval"))
    accuracy, completion, greedy = ("-" if row[a] is None else percent(row[a], row[b]) for a, b in pairs)
    runs = str(row["cells"]) if row["cells"] == row["cells_asked"] else f"{row['cells']} of {row['cells_asked']}"
    time = duration(row["seconds"]) if row["episodes"] else "-"
    return [_plain(row["method"]), accuracy, _difference(row, against), completion, greedy, runs, time]


def _difference(row: Mapping[str, Any], against: str) -> str:
    found = (row.get("difference") or {}).get("accuracy")
    if not found:
        return "reference" if row["method"] == against else "-"
    ends = found["interval"]
    text = f"{100 * found['mean']:+.1f}"
    return f"{text} [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" if ends else text


def _runs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs that are not finished, or have a finding."""
    lines = []
    for run in runs:
        found = [finding for finding in run["health"] if finding["level"] == "bad"]
        if run["state"]["name"] != "finished":
            lines.append(f"- {_plain(run['label'])}: {run['state']['text']}")
        lines += [f"- {_plain(run['label'])}: {_plain(finding['text'])}" for finding in found]
    more = [f"- and {len(lines) - MAX_RUNS} more"] if len(lines) > MAX_RUNS else []
    return ["", *lines[:MAX_RUNS], *more]


def _accuracy(point: Mapping[str, Any]) -> str:
    return percent(point["accuracy"], point["interval"])


def _finding(finding: Mapping[str, str]) -> str:
    mark = "**Warning**: " if finding["level"] == "bad" else ""
    cure = f" {finding['cure']}." if finding["cure"] else ""
    return f"- {mark}{_plain(finding['text'])}{'.' if cure else ''}{_plain(cure)}"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _plain(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    line = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        line = line.replace(sign, f"\\{sign}")
    return line
