"""The first view: what was run, what it gained, and the state of health in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.files.lock import is_locked
from skillsd.methods import METHODS
from skillsd.page.numbers import short
from skillsd.page.subject import LabelledRun
from skillsd.report.progress import duration
from skillsd.runs.closing import counted, work
from skillsd.runs.folder import LOCK
from skillsd.runs.opened import OpenRun
from skillsd.training.health import health

Record = Mapping[str, Any]


def overview(labelled: LabelledRun, metrics: Sequence[Record], evaluations: Sequence[Record]) -> dict[str, Any]:
    """The facts of a run.

    Args:
        metrics, evaluations: the run's records.
    """
    run = labelled.run
    return {
        "state": state(run, metrics),
        "facts": facts(labelled, metrics),
        "accuracy": gains(evaluations),
        "work": work(metrics, run.config) if metrics else "No iteration is finished yet.",
        "health": in_words(run, metrics),
        "manifest": _manifest(run),
        "config": run.config.model_dump(mode="json"),
    }


def state(run: OpenRun, metrics: Sequence[Record]) -> dict[str, Any]:
    """``name``: finished, running or stopped; ``text`` in words."""
    done, wanted = int(metrics[-1]["iteration"]) if metrics else 0, run.config.training.iterations
    far = f"{done} of {wanted} iterations"
    if done >= wanted:
        return {"name": "finished", "text": f"finished: {far}"}
    if is_locked(run.folder / LOCK):
        return {"name": "running", "text": f"still training: {far} so far"}
    return {"name": "stopped", "text": f"stopped early: {far}"}


def facts(labelled: LabelledRun, metrics: Sequence[Record]) -> list[tuple[str, str]]:
    """What was run, as pairs of a name and a value."""
    run, config = labelled.run, labelled.run.config
    manifest = _manifest(run)
    row = METHODS[config.method]
    environment = config.environment.name
    if config.environment.options:
        environment += f" ({', '.join(f'{key}={value}' for key, value in config.environment.options.items())})"
    lora = f", LoRA of rank {config.model.lora.rank}" if config.model.lora else ""
    panels: Mapping[str, Any] = manifest.get("panels") or {}
    split = config.evaluation.split
    named = f" ({labelled.method})" if labelled.method != config.method else ""
    found = [
        ("method", f"{config.method}{named}: {row.description}"),
        ("model", f"{config.model.name}{lora}, {config.model.dtype}"),
        ("base weights", str((manifest.get("model") or {}).get("weights") or "unknown")),
        ("environment", environment),
        ("evaluated on", f"{split}, panel {panels.get(split, 'unknown')}"),
        ("seed", str(config.seed)),
        ("commit", str(manifest.get("commit") or "unknown")),
        ("started", str(manifest.get("started") or "unknown")),
    ]
    if metrics:
        last = metrics[-1]
        found += [("episodes", f"{last['episodes']:,.0f}"), ("training time", duration(last["seconds"]))]
    return found


def gains(evaluations: Sequence[Record]) -> list[dict[str, Any]]:
    """Accuracy before and after, sampled and, if measured, greedy, each with the interval over tasks."""
    found = []
    for name, how in (("eval", "sampled"), ("eval_greedy", "greedy")):
        measured = [r for r in evaluations if r.get(f"{name}/accuracy") is not None]
        if measured:
            first, last = measured[0], measured[-1]
            found.append(
                {
                    "how": how,
                    "split": last.get(f"{name}/split"),
                    "tasks": last.get(f"{name}/tasks"),
                    "before": _point(first, name),
                    "after": _point(last, name) if last is not first else None,
                }
            )
    return found


def _point(record: Record, name: str) -> dict[str, Any]:
    interval = record.get(f"{name}/interval")
    return {
        "episodes": record["episodes"],
        "accuracy": short(record[f"{name}/accuracy"]),
        "interval": None if interval is None else [short(end) for end in interval],
    }


def in_words(run: OpenRun, metrics: Sequence[Record]) -> list[dict[str, str]]:
    """The state of health: the findings of `skillsd.training.health`, then what the teacher and the reward did.

    Each has a ``level`` (``bad``, ``good`` or ``plain``), a ``text``, and for a finding what would cure it.
    """
    if not metrics:
        return []
    config, row = run.config, METHODS[run.config.method]
    found = [{"level": "bad", "text": f.text, "cure": f.cure} for f in health(metrics, config)]
    lines = []
    if row.teacher != "none":
        lines.append(_teacher(metrics, run))
    if row.reward_weight:
        equal = [float(r.get("batch/zero_advantage_groups") or 0) for r in metrics]
        lines.append(
            f"The rewards of {sum(equal) / len(equal):.0%} of the groups were equal, so L_GRPO learnt nothing from "
            f"them ({equal[-1]:.0%} in the last iteration)."
        )
    lines += _differences(metrics)
    known = [{"level": "plain", "text": line, "cure": ""} for line in lines]
    if not found:
        checked = "None of the states in which nothing is learnt was found."
        known.insert(0, {"level": "good", "text": checked, "cure": ""})
    return found + known


def _teacher(metrics: Sequence[Record], run: OpenRun) -> str:
    silent = [int(r["iteration"]) for r in metrics if not r.get("batch/groups_with_teacher")]
    spoke, groups = counted(metrics, run.config, "batch/groups_with_teacher")
    text = f"The teacher scored {spoke:,} of {groups:,} groups."
    if silent and silent == list(range(1, len(silent) + 1)) and len(silent) < len(metrics):
        return f"{text} In the first {len(silent)} of {len(metrics)} iterations it scored none: the bank starts empty."
    if silent:
        return f"{text} It scored none in {len(silent)} of {len(metrics)} iterations."
    return text


def _differences(metrics: Sequence[Record]) -> list[str]:
    found = [float(r["sampler_trainer_logprob_diff/max"]) for r in metrics if _is_number(r, _DIFFERENCE)]
    return [f"Sampler and trainer differ by at most {max(found):.1e} nats per token."] if found else []


_DIFFERENCE = "sampler_trainer_logprob_diff/max"


def _is_number(record: Record, name: str) -> bool:
    value = record.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def _manifest(run: OpenRun) -> dict[str, Any]:
    """The manifest; empty if it is not there. A run without one can still be looked at."""
    return run.manifest if (run.folder / "manifest.json").is_file() else {}
