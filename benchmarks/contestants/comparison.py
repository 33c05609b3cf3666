"""The contestants' results in `vs_trl.py`: checks that the work is equal, figures and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import workload as work

STEP_SECONDS = 0.05
"""Duration of a step of the slow environment."""
TOLERANCE = 1e-4
ORDER = ("ours-grpo", "ours-skill-sd", "trl-rollout-func", "trl-environment-factory", "floor")
"""Contestants in the order of the tables."""


class Failure(Exception):  # noqa: N818 (shown to the user)
    """The benchmark cannot continue."""


@dataclass(frozen=True)
class Job:
    """One process of a contestant.

    Attributes:
        contestant: one of `ORDER`.
        kind: ``step`` (whole steps), ``pair`` (GRPO and Skill-SD in turn), ``slow`` (a slow environment), ``growth``
            (with the number of turns) or ``loss``.
        turns: of each of its rollouts.
        options: the JSON that the contestant gets; its ``job`` may be named differently from `kind`.
        cost: rough estimate in seconds, for the display of the time left.
    """

    contestant: str
    kind: str
    turns: tuple[int, ...]
    options: dict[str, Any]
    cost: float


# ----------------------------------------------------------------------------------------------------- equal work


def check_tokens(job: Job, measured: dict[str, Any], turns: int) -> None:
    wanted = work.expected_tokens(turns)
    for name, found in measured["tokens"].items():
        if found != wanted[name]:
            raise Failure(f"{job.contestant}, {turns} turns: {found} {name} tokens, expected {wanted[name]}")


def check_losses(losses: dict[str, list[dict[str, float]]]) -> None:
    """Check that loss and gradient norm of both updates agree between all contestants."""
    (first, reference), *others = losses.items()
    for name, updates in others:
        for number, (theirs, ours) in enumerate(zip(updates, reference, strict=True), 1):
            for key in ("loss", "grad_norm", "trained"):
                if not math.isclose(theirs[key], ours[key], rel_tol=TOLERANCE, abs_tol=TOLERANCE * TOLERANCE):
                    raise Failure(
                        f"update {number}: {key} is {theirs[key]} for {name}, but {ours[key]} for {first}: "
                        "the contestants do not do the same work"
                    )


# --------------------------------------------------------------------------------------------------------- figures


@dataclass
class Collected:
    """The results of all jobs."""

    losses: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    steps: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)
    pairs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    growth: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)
    slow: dict[tuple[str, int, float], list[dict[str, float]]] = field(default_factory=dict)

    def add(self, job: Job, result: dict[str, Any]) -> str:
        """Check and store a result; returns a summary for the terminal."""
        if job.kind == "loss":
            self.losses[job.contestant] = result["updates"]
            check_losses(self.losses)
            return ", ".join(f"loss {u['loss']:.7f}, gradient {u['grad_norm']:.6f}" for u in result["updates"])
        if job.kind == "pair":
            self.pairs.setdefault(job.turns[0], []).extend(result["pairs"])
            return ", ".join(f"{p['skill-sd']:.1f} to {p['grpo']:.1f} s" for p in result["pairs"])
        if job.kind == "step":
            for one in result["steps"]:
                check_tokens(job, one, job.turns[0])
                kinds = ("cpu", "system", "wall")
                row = {f"{phase}_{kind}": one[kind][phase] for kind in kinds for phase in one[kind]}
                for kind in kinds:  # the rest: neither the rollout nor the teacher's pass
                    rest = row[f"step_{kind}"] - row[f"rollout_{kind}"] - row.get(f"teacher_{kind}", 0.0)
                    row[f"update_{kind}"] = rest
                row |= {name: result[name] for name in ("peak_mib", "peak_before_mib") if name in result}
                self.steps.setdefault((job.contestant, job.turns[0]), []).append(row)
            return f"rollout {row['rollout_cpu']:.2f} s, step {row['step_cpu']:.2f} s, {row['peak_mib']:.0f} MiB"
        for one in result["rollouts"]:
            check_tokens(job, one, one["turns"])
            row = {"cpu": one["cpu"]["rollout"], "wall": one["wall"]["rollout"]}
            if job.kind == "growth":
                self.growth.setdefault((job.contestant, one["turns"]), []).append(row)
            else:
                self.slow.setdefault((job.contestant, one["turns"], one["environment_seconds"]), []).append(row)
        kind = "cpu" if job.kind == "growth" else "wall"
        return ", ".join(f"{one['turns']} turns {one[kind]['rollout']:.1f} s" for one in result["rollouts"])


def spread(rows: Sequence[dict[str, float]], name: str) -> dict[str, float]:
    values = [row[name] for row in rows]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def exponent(points: dict[int, float]) -> float | None:
    """The exponent in ``seconds = a * turns ** exponent``, by least squares on the logarithms."""
    if len(points) < 2:
        return None
    x, y = [math.log(turns) for turns in points], [math.log(seconds) for seconds in points.values()]
    return statistics.linear_regression(x, y).slope


def figures(collected: Collected, turns: Sequence[int]) -> dict[str, Any]:
    """The headline figures; None where a contestant they need was left out."""

    def median(contestant: str, count: int, name: str) -> float | None:
        rows = collected.steps.get((contestant, count))
        return statistics.median(row[name] for row in rows) if rows else None

    def least(count: int, name: str) -> float | None:
        both = [median(c, count, name) for c in ORDER if c.startswith("trl")]
        return min((value for value in both if value is not None), default=None)

    def ratios(above: Any, below: Any) -> dict[str, float]:
        pairs = {str(count): (above(count), below(count)) for count in turns}
        return {count: a / b for count, (a, b) in pairs.items() if a is not None and b is not None}

    def ours(name: str) -> Any:
        return lambda count: median("ours-grpo", count, name)

    rollout_vs_floor = ratios(lambda count: median("floor", count, "rollout_cpu"), ours("rollout_cpu"))
    memory = {
        name: ratios(lambda c, name=name: median(name, c, "peak_mib"), lambda c: least(c, "peak_mib"))
        for name in ("ours-grpo", "ours-skill-sd")
    }
    waits = {}
    for count in turns:
        alone, slow = (collected.slow.get(("ours-grpo", count, pace)) for pace in (0.0, STEP_SECONDS))
        if alone and slow:
            longest = max(spread(alone, "wall")["median"], count * STEP_SECONDS)
            waits[str(count)] = spread(slow, "wall")["median"] / longest
    over, teacher = {}, {}
    for count, pairs in collected.pairs.items():
        over[str(count)] = statistics.median(p["skill-sd"] / p["grpo"] for p in pairs)
        extra = statistics.median(p["skill-sd"] - p["grpo"] for p in pairs)
        teacher[str(count)] = extra / statistics.median(p["teacher"] for p in pairs)
    grown = {
        name: {t: spread(rows, "cpu")["median"] for (who, t), rows in collected.growth.items() if who == name}
        for name in ("ours-grpo", "floor")
    }
    return {
        "rollout_ratio": ratios(lambda count: least(count, "rollout_cpu"), ours("rollout_cpu")),
        "step_ratio": ratios(lambda count: least(count, "step_cpu"), ours("step_cpu")),
        "rollout_vs_floor": min(rollout_vs_floor.values(), default=None),
        "env_wait_ratio": waits,
        "skill_sd_over_grpo": max(over.values(), default=None),
        "teacher_pass_ratio": max(teacher.values(), default=None),
        "turn_exponent": exponent(grown["ours-grpo"]),
        "floor_turn_exponent": exponent(grown["floor"]),
        "peak_memory_ratio": max((x for by in memory.values() for x in by.values()), default=None),
        "by_turns": {
            "rollout_vs_floor": rollout_vs_floor,
            "step_vs_floor": ratios(lambda count: median("floor", count, "step_cpu"), ours("step_cpu")),
            "skill_sd_over_grpo": over,
            "teacher_pass_ratio": teacher,
            "peak_memory_ratio": memory,
            "growth": {name: {str(t): s for t, s in points.items()} for name, points in grown.items()},
        },
    }


def details(collected: Collected) -> dict[str, Any]:
    """Median, minimum and maximum of everything measured."""
    steps: dict[str, Any] = {}
    for (contestant, count), rows in collected.steps.items():
        measured = {name: spread(rows, name) for name in rows[0]}
        steps.setdefault(contestant, {})[str(count)] = {**measured, "samples": len(rows)}
    slow: dict[str, Any] = {}
    for (contestant, count, pace), rows in collected.slow.items():
        slow.setdefault(contestant, {}).setdefault(str(count), {})[f"{pace:g} s a step"] = spread(rows, "wall")
    growth: dict[str, Any] = {}
    for (contestant, count), rows in collected.growth.items():
        growth.setdefault(contestant, {})[str(count)] = spread(rows, "cpu")
    pairs = {
        str(count): {name: spread(rows, name) for name in rows[0]} | {"samples": len(rows)}
        for count, rows in collected.pairs.items()
    }
    return {"steps": steps, "slow_environment_wall": slow, "growth_cpu": growth, "pairs_cpu": pairs}


# ---------------------------------------------------------------------------------------------------------- report


def markdown(results: dict[str, Any]) -> str:
    """The tables for docs/performance.md, from the content of the JSON file."""
    steps = results["detail"]["steps"]
    lines = [
        "| turns | contestant | rollout | teacher's pass | update | whole step | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in dict.fromkeys(c for by in steps.values() for c in by):
        for name in (name for name in ORDER if count in steps.get(name, {})):
            row = {key: value["median"] for key, value in steps[name][count].items() if key != "samples"}
            teacher = f"{row['teacher_cpu']:.1f} s" if "teacher_cpu" in row else "-"
            lines.append(
                f"| {count} | {name} | {row['rollout_cpu']:.2f} s | {teacher} | {row['update_cpu']:.1f} s "
                f"| {row['step_cpu']:.1f} s | {row['peak_mib']:.0f} MiB |"
            )

    def by_turns(values: dict[str, float]) -> str:
        return ", ".join(f"{value:.2f} ({count} turns)" for count, value in values.items()) or "not measured"

    def one(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.2f}"

    counts = map(int, results["detail"]["growth_cpu"].get("ours-grpo", ()))
    arithmetic = exponent({count: work.arithmetic(count) for count in counts})
    lines += ["", "| figure | measured | goal |", "|---|---|---|"]
    lines += [
        f"| {name} | {value} | {goal} |"
        for name, value, goal in [
            ("rollout, TRL's CPU seconds / ours", by_turns(results["rollout_ratio"]), "4.5 (8 turns), 6 (24 turns)"),
            ("rollout, our speed / the floor's", one(results["rollout_vs_floor"]), "0.85"),
            ("whole GRPO step, TRL / ours", by_turns(results["step_ratio"]), "2 (8 turns), 2.5 (24 turns)"),
            ("50 ms environment, wall / max(compute, wait)", by_turns(results["env_wait_ratio"]), "at most 1.2"),
            ("Skill-SD / GRPO, per iteration", one(results["skill_sd_over_grpo"]), "-"),
            ("extra time of Skill-SD / the teacher's pass alone", one(results["teacher_pass_ratio"]), "at most 1.05"),
            (
                "growth of the rollout with turns, exponent, ours",
                one(results["turn_exponent"]),
                f"{one(arithmetic)}, that of the arithmetic alone",
            ),
            ("growth of the rollout with turns, exponent, floor", one(results["floor_turn_exponent"]), "-"),
            ("peak memory, ours / TRL's", one(results["peak_memory_ratio"]), "at most 1"),
        ]
    ]
    slow = results["detail"]["slow_environment_wall"]
    if slow:
        lines += ["", "| turns | contestant | environment | rollout, wall-clock |", "|---|---|---|---|"]
        for name, by in slow.items():
            for count, paces in by.items():
                lines += [f"| {count} | {name} | {pace} | {x['median']:.1f} s |" for pace, x in paces.items()]
    return "\n".join(lines)
