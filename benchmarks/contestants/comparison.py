"""What the contestants of `vs_trl.py` measured: checked to be the same work, put together, and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import workload as work

STEP_SECONDS = 0.05
"""What a step of the slow environment takes."""
TOLERANCE = 1e-4
ORDER = ("ours-grpo", "ours-skill-sd", "trl-rollout-func", "trl-environment-factory", "floor")
"""Contestants as the tables list them."""


class Failure(Exception):  # noqa: N818 (told to the user as it is)
    """The benchmark cannot go on; the message says why."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        contestant: one of `ORDER`.
        kind: ``step`` (whole steps), ``pair``, ``slow`` (a slow environment), ``growth`` or ``loss``.
        turns: of each of its rollouts.
        options: of the contestant's job, which may have another name than `kind`.
        cost: seconds that it takes, roughly; only for the time left.
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
            raise Failure(f"{job.contestant}, {turns} turns: {found} {name} tokens, where the work is {wanted[name]}")


def check_losses(losses: dict[str, list[dict[str, float]]]) -> None:
    """Loss and gradient norm of both updates agree between all contestants."""
    (first, reference), *others = losses.items()
    for name, updates in others:
        for number, (theirs, ours) in enumerate(zip(updates, reference, strict=True), 1):
            for key in ("loss", "grad_norm", "trained"):
                if not math.isclose(theirs[key], ours[key], rel_tol=TOLERANCE, abs_tol=TOLERANCE * TOLERANCE):
                    raise Failure(f"update {number}: the {key} of {name} is {theirs[key]}, that of {first} {ours[key]}")


# --------------------------------------------------------------------------------------------------------- figures


@dataclass
class Collected:
    """What all jobs measured."""

    losses: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    steps: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)
    pairs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    growth: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)
    slow: dict[tuple[str, int, float], list[dict[str, float]]] = field(default_factory=dict)

    def add(self, job: Job, result: dict[str, Any]) -> str:
        """Check and keep a result; returns it in a few words."""
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
                for kind in kinds:  # all that is not the rollout; the teacher's pass apart
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


def evenly_spaced(rows: Sequence[dict[str, float]], name: str) -> dict[str, float]:
    values = [row[name] for row in rows]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def exponent(points: dict[int, float]) -> float | None:
    """Of ``seconds = a * turns ** exponent``, by least squares of the logarithms."""
    if len(points) < 2:
        return None
    x, y = [math.log(turns) for turns in points], [math.log(seconds) for seconds in points.values()]
    return statistics.linear_regression(x, y).slope


def figures(collected: Collected, turns: Sequence[int]) -> dict[str, Any]:
    """The headline figures; None where a contestant that they need was left out."""

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
            longest = max(evenly_spaced(alone, "wall")["median"], count * STEP_SECONDS)
            waits[str(count)] = evenly_spaced(slow, "wall")["median"] / longest
    over, teacher = {}, {}
    for count, pairs in collected.pairs.items():
        over[str(count)] = statistics.median(p["skill-sd"] / p["grpo"] for p in pairs)
        extra = statistics.median(p["skill-sd"] - p["grpo"] for p in pairs)
        teacher[str(count)] = extra / statistics.median(p["teacher"] for p in pairs)
    grown = {
        name: {t: evenly_spaced(rows, "cpu")["median"] for (who, t), rows in collected.growth.items() if who == name}
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
    """Median, smallest and largest of everything measured."""
    steps: dict[str, Any] = {}
    for (contestant, count), rows in collected.steps.items():
        measured = {name: evenly_spaced(rows, name) for name in rows[0]}
        steps.setdefault(contestant, {})[str(count)] = {**measured, "samples": len(rows)}
    slow: dict[str, Any] = {}
    for (contestant, count, pace), rows in collected.slow.items():
        slow.setdefault(contestant, {}).setdefault(str(count), {})[f"{pace:g} s a step"] = evenly_spaced(rows, "wall")
    growth: dict[str, Any] = {}
    for (contestant, count), rows in collected.growth.items():
        growth.setdefault(contestant, {})[str(count)] = evenly_spaced(rows, "cpu")
    pairs = {
        str(count): {name: evenly_spaced(rows, name) for name in rows[0]} | {"samples": len(rows)}
        for count, rows in collected.pairs.items()
    }
    return {"steps": steps, "slow_environment_wall": slow, "growth_cpu": growth, "pairs_cpu": pairs}


# ---------------------------------------------------------------------------------------------------------- report


def markdown(results: dict[str, Any]) -> str:
    """The tables for docs/performance.md, of a JSON's content."""
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

    lines += ["", "| figure | measured | goal |", "|---|---|---|"]
    lines += [
        f"| {name} | {value} | {goal} |"
        for name, value, goal in [
            ("rollout, TRL's CPU seconds / ours", by_turns(results["rollout_ratio"]), "4.5 (8 turns), 6 (24 turns)"),
            ("rollout, our speed / the floor's", one(results["rollout_vs_floor"]), "0.85"),
            ("whole GRPO step, TRL / ours", by_turns(results["step_ratio"]), "2 (8 turns), 2.5 (24 turns)"),
            ("50 ms environment, wall / the longer of both", by_turns(results["env_wait_ratio"]), "at most 1.2"),
            ("Skill-SD / GRPO, an iteration", one(results["skill_sd_over_grpo"]), "-"),
            ("what Skill-SD adds / the teacher's pass alone", one(results["teacher_pass_ratio"]), "at most 1.05"),
            ("growth of the rollout with turns, exponent", one(results["turn_exponent"]), "at most 1.1"),
            ("the floor's", one(results["floor_turn_exponent"]), "-"),
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
