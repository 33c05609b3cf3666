"""Tables of docs/results/appworld.md."""

from __future__ import annotations

from typing import Any

from blocks.common import benchmark, percent, results, table

PROMPTS = {
    "plain": "plain",
    "golden skill": "with a golden skill: the rule-based summary of the reference solution",
    "another task's skill": "with another task's golden skill",
}
APPS = {
    "spotify": "Spotify",
    "venmo": "Venmo",
    "simple_note": "SimpleNote",
    "phone": "phone",
    "todoist": "Todoist",
    "gmail": "Gmail",
    "file_system": "files",
}


def skills() -> str:
    """The check after the warm start."""
    rows = [
        [PROMPTS[row["prompt"]], percent(row["sampled"], row["interval"]), percent(row["greedy"])]
        for row in results("appworld")["warm_start"]["figures"]
    ]
    return table(["prompt", "sampled", "greedy"], rows)


def tasks() -> str:
    rows = []
    for split, found in results("appworld")["task_world"]["splits"].items():
        scenarios = str(found["scenarios"])
        if split.endswith("_scenario"):
            scenarios += " others"
        elif split != "train":
            scenarios = f"the same {scenarios}"
        difficulties = " / ".join(str(found["by_difficulty"].get(level, 0)) for level in "123")
        rows.append([split, found["tasks"], scenarios, difficulties, *(found["by_app"].get(app, "-") for app in APPS)])
    return table(["split", "tasks", "scenarios", "difficulty 1 / 2 / 3", *APPS.values()], rows)


def speed() -> str:
    found = benchmark("appworld")

    def rate(measured: dict[str, Any]) -> str:
        rates = sorted(found["episodes"] / one["seconds"] for one in measured["rounds"])
        return f"{measured['episodes_per_second']:.1f} ({rates[0]:.1f}, {rates[-1]:.1f})"

    rows = []
    for workers, kinds in found["workers"].items():
        both = (kinds["forked"], kinds["pooled"])
        rows.append(
            [
                workers,
                *map(rate, both),
                *(f"{measured['peak_mib']:.0f}" for measured in both),
                *(f"{measured['seconds_lost_by_hanging']:.1f}" for measured in both),
            ]
        )
    columns = ["in parallel", "fork server with a jail, episodes/s", "pool, episodes/s", "MiB", "pool, MiB"]
    return table([*columns, "seconds lost to hanging", "pool, seconds lost"], rows)


RENDERERS = {"appworld-skills": skills, "appworld-tasks": tasks, "appworld-speed": speed}
