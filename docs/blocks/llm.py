"""Tables of docs/results/llm.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from blocks.common import ends, percent, points, results, significant, table

MODELS = {
    "untouched": "untouched",
    "warm-start": "after the warm start",
    "trained": "after 6 iterations of Skill-SD",
}
DIFFERENCES = {"warm-start minus untouched": "warm start minus untouched"}
DIFFERENCES["trained minus warm-start"] = "Skill-SD minus warm start"
ENGINES = {"torch": "embedded", "vllm": "vLLM"}
MIB, GIB = 1 << 20, 1 << 30


def accuracy() -> str:
    rows = []
    for key, name in MODELS.items():
        both = [results("llm")["accuracy"][key][kind] for kind in ("sampled", "greedy")]
        turns = dict.fromkeys(f"{record['mean_turns']:.1f}" for record in both)  # one figure if they are the same
        if all(record["invalid_turns"] == record["turns"] for record in both):
            invalid = "100 %"
        else:
            invalid = "; ".join(
                f"{record['invalid_turns']} of {record['turns']:,}" if record["invalid_turns"] else "none"
                for record in both
            )
        took = ", ".join(f"{record['seconds']:.0f} s" for record in both)
        figures = [percent(record["accuracy"], record["interval"]) for record in both]
        rows.append([name, *figures, ", ".join(turns), invalid, took])
    columns = ["model", "sampled", "greedy", "turns per episode", "invalid answers", "duration (sampled, greedy)"]
    return table(columns, rows)


def differences() -> str:
    rows = []
    for key, name in DIFFERENCES.items():
        both = [results("llm")["differences"][f"{key}, {kind}"] for kind in ("sampled", "greedy")]
        cells = [points(found["difference"], found["interval"]) for found in both]
        if any(found["lost"] for found in both):
            levels = ["level " if both[0]["gained"] == 1 else "levels ", ""]
            cells = [
                f"{cell}: {found['gained']} {noun}gained, {found['lost']} lost"
                for cell, found, noun in zip(cells, both, levels, strict=True)
            ]
        rows.append([name, *cells])
    return table(["difference, paired by level", "sampled", "greedy"], rows)


def seconds() -> str:
    training = results("llm")["training"]
    phases = training["seconds"]
    taught = [row for row in training["rows"] if row["batch/groups_with_teacher"]]
    teacher = [row["time/teacher"] for row in taught]
    when = " and ".join(str(row["iteration"]) for row in taught)
    rows = [
        _spread("rollout", phases["rollout"], 1),
        [
            f"teacher (iterations {when}; 0.01 s or less before)",
            *(f"{value:.1f}" for value in (statistics.fmean(teacher), min(teacher), max(teacher))),
        ],
        _spread("update (two steps)", phases["update"], 1),
        _spread("skills, by rules", phases["summarise"], 2),
        _spread("iteration", phases["iteration"], 1),
    ]
    return table(["seconds per iteration", "mean", "min", "max"], rows)


def tokens_per_second() -> str:
    speeds = results("llm")["training"]["tokens_per_second"]
    rows = [
        _spread("rollout: sampled tokens", speeds["rollout, sampled"], 1),
        _spread("rollout: all tokens (prompts and observations too)", speeds["rollout, all"], 0),
        _spread("update: all tokens", speeds["update, all"], 0),
    ]
    return table(["tokens per second", "mean", "min", "max"], rows)


def _spread(name: str, found: dict[str, float], digits: int) -> list[str]:
    return [name, *(f"{found[key]:.{digits}f}" for key in ("mean", "min", "max"))]


def memory() -> str:
    found, training = results("llm")["memory"], results("llm")["training"]["rows"]

    def gib(count: float | None) -> str:
        return "-" if count is None else f"{count / GIB:.2f} GiB"

    def measured(name: str, key: str) -> Sequence[str]:
        mmap = found.get(f"{key}-mmap", {}).get("peak_bytes")
        return [name, gib(found[key]["estimated_bytes"]), gib(found[key]["peak_bytes"]), gib(mmap)]

    recipe = found["recipe-mmap"]
    estimated = gib(recipe["estimated_bytes"])
    first, last = (gib(MIB * row["memory/peak_mib"]) for row in (training[0], training[-1]))
    rows = [
        measured("all weights, float32", "full-float32"),
        measured("LoRA, float32", "lora-float32"),
        measured("all weights, bfloat16", "full-bfloat16"),
        measured("LoRA, bfloat16", "lora-bfloat16"),
        ["`sokoban-smollm2`, first iteration of the run", estimated, first, gib(recipe["peak_bytes"])],
        ["the same, after six", estimated, last, "-"],
    ]
    return table(["", "estimated", "measured", "with `MALLOC_MMAP_THRESHOLD_=1048576`"], rows)


def gap() -> str:
    rows = []
    for found in results("llm")["gap"].values():
        name = ENGINES[found["engine"]]
        if "version" in found:
            name += f" {found['version']}, CPU build"
        for label, head in (("before", [name, found["dtype"]]), ("after", ["", ""])):
            figures = found[label]
            shown = [significant(figures[key]) for key in ("mean", "p99", "max")]
            rows.append([*head, {"after": "after the change"}.get(label, label), f"{figures['tokens']:,}", *shown])
    return table(["engine", "dtype", "", "tokens", "mean", "p99", "max"], rows)


def stale() -> str:
    rows = []
    for key, name in (("output head", "the output head alone"), ("all weights", "all weights")):
        for place, found in enumerate(results("llm")["gap"].values()):
            figures = found["stale"][key]
            shown = [f"{figures['mean']:.2f}", f"{figures['p99']:.1f}", f"{figures['max']:.1f}"]
            rows.append(["" if place else name, ENGINES[found["engine"]], found["dtype"], *shown])
    return table(["stale", "tokens of", "dtype", "mean", "p99", "max"], rows)


def server() -> str:
    rows = []
    for key, name in (("untouched", "smollm2-135m"), ("warm-start", MODELS["warm-start"])):
        served = results("llm")["server"][key]
        [figures] = served["eval"]["figures"]
        spent, solved = figures["spent"], figures["outcomes"].get("solved", 0)
        share = f": {percent(figures['accuracy'])} %" if solved else ""
        rows.append(
            [
                name,
                f"{served['start_seconds']:.0f} s",
                spent["calls"],
                f"{spent['tokens_in']:,}, {spent['tokens_out']:,}",
                f"{figures['seconds']:.0f}",
                f"{figures['invalid_turns']} of {figures['turns']}",
                f"{solved} of {figures['episodes']}{share} {ends(figures['interval'])}",
            ]
        )
    columns = ["served model", "ready after", "requests", "tokens in, out", "seconds"]
    return table([*columns, "invalid answers", "solved"], rows)


def summaries() -> str:
    found: dict[str, Any] = results("llm")["server"]["untouched"]["summaries"]
    counts = found["counts"]
    rejected = {key.removeprefix("rejected_"): n for key, n in counts.items() if key.startswith("rejected_")}
    failed = sum(n for key, n in counts.items() if key.startswith("failed"))
    if len(rejected) == 1:
        [(reason, number)] = rejected.items()
        shown = f"{number}, all as `{reason}`"
    else:
        shown = ", ".join(f"{number} as `{reason}`" for reason, number in rejected.items()) or "0"
    row = [
        counts["submitted"],
        counts["added"],
        shown,
        failed,
        f"{counts['tokens_in']:,}, {counts['tokens_out']:,}",
        f"{found['seconds'] / counts['submitted']:.1f}",
    ]
    return table(["requested", "accepted", "rejected", "failed", "tokens in, out", "seconds per summary (mean)"], [row])


RENDERERS = {
    "llm-accuracy": accuracy,
    "llm-differences": differences,
    "llm-seconds": seconds,
    "llm-tokens-per-second": tokens_per_second,
    "llm-memory": memory,
    "llm-gap": gap,
    "llm-stale": stale,
    "llm-server": server,
    "llm-summaries": summaries,
}
