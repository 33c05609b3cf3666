"""The second view: metrics as columns, and the means of a table's methods with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.page.numbers import short
from skillsd.page.subject import LabelledRun
from skillsd.sweeps.results import mean_over, unit_of
from skillsd.training.health import summary_counts

Record = Mapping[str, Any]
Columns = dict[str, list[Any]]

METRICS = (
    "rollout/accuracy", "rollout/reward", "rollout/reward_std_in_groups", "rollout/entropy_estimate", "rollout/turns",
    "rollout/tokens", "batch/groups_with_teacher", "batch/zero_advantage_groups", "loss/teacher_log_ratio",
    "loss/teacher_k3", "reading/gap", "loss/ratio_max", "loss/clip_fraction", "loss/kl_old_new",
    "sampler_trainer_logprob_diff/p99", "sampler_trainer_logprob_diff/max", "step/grad_norm", "skills/new",
    "skills/skills", "skills/picked", "skills/picks", "time/iteration",
)  # fmt: skip
"""The metrics that are drawn. The others are in metrics.jsonl."""

EVALUATIONS = ("accuracy", "completion", "mean_turns")
COSTS = ("iteration", "episodes", "seconds")
SHARES = frozenset(
    {
        *("eval/accuracy", "eval/completion", "rollout/accuracy", "rollout/reward", "batch/groups_with_teacher"),
        "reading/gap",
        *("batch/zero_advantage_groups", "loss/clip_fraction"),
    }
)
SIGNED = frozenset({"loss/teacher_log_ratio", "reading/gap"})
"""Metrics in [0, 1], and those that may be below 0: an interval does not go beyond what a metric can be."""


def metric_columns(records: Sequence[Record]) -> Columns:
    """Name -> a value per iteration, null where it is missing. Metrics that no record has are left out."""
    columns = {name: [short(record.get(name)) for record in records] for name in (*COSTS, *METRICS)}
    refused = [_refused(record) for record in records]
    columns["skills/refused"] = [now - before for before, now in zip([0, *refused], refused, strict=False)]
    if not any(name.startswith("summaries/") for record in records for name in record):
        del columns["skills/refused"]
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def evaluation_columns(records: Sequence[Record]) -> Columns:
    """The learning curve: per evaluation the costs, the figures, and ``..._low`` and ``..._high`` of the intervals."""
    columns: Columns = {name: [short(record.get(name)) for record in records] for name in COSTS}
    for kind in ("eval", "eval_greedy"):
        for name in EVALUATIONS:
            columns[f"{kind}/{name}"] = [short(record.get(f"{kind}/{name}")) for record in records]
        for name, interval in (("accuracy", "interval"), ("completion", "completion_interval")):
            for place, end in enumerate(("low", "high")):
                pairs = [record.get(f"{kind}/{interval}") for record in records]
                columns[f"{kind}/{name}_{end}"] = [None if pair is None else short(pair[place]) for pair in pairs]
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _refused(record: Record) -> int:
    """Summaries so far that were refused, failed or not written for lack of budget."""
    counts = summary_counts(record)
    return sum(n for name, n in counts.items() if name not in ("submitted", "added", "duplicate", "no_skill"))


# -- several runs ---------------------------------------------------------------------------------------------------

Series = Mapping[str, Columns]
"""``metrics`` and ``evaluations`` of a run, as above."""


def means(runs: Sequence[tuple[LabelledRun, Series]]) -> dict[str, dict[str, Columns]]:
    """Method -> ``metrics`` and ``evaluations``: per iteration that all of its runs have, the mean over runs with its
    95 % interval (Student's t over base models if there are several, else over seeds), as ``NAME``, ``NAME_low`` and
    ``NAME_high``. Methods with one run are left out.
    """
    methods: dict[str, list[tuple[LabelledRun, Series]]] = {}
    for labelled, series in runs:
        methods.setdefault(labelled.method, []).append((labelled, series))
    return {
        method: {
            part: _means([(label, series[part]) for label, series in those]) for part in ("metrics", "evaluations")
        }
        for method, those in methods.items()
        if len(those) > 1
    }


def _means(runs: Sequence[tuple[LabelledRun, Columns]]) -> Columns:
    unit = unit_of(len({label.model for label, _ in runs}), len({label.seed for label, _ in runs}))
    at = [{n: place for place, n in enumerate(columns.get("iteration", []))} for _, columns in runs]
    common = sorted(set.intersection(*(set(places) for places in at)))
    names = [name for name in runs[0][1] if not name.endswith(("_low", "_high")) and name != "iteration"]
    found: Columns = {"iteration": list(common)}
    for name in names:
        if not all(name in columns for _, columns in runs):
            continue
        bounds = (-math.inf if name in SIGNED else 0.0, 1.0 if name in SHARES else math.inf)
        estimates = []
        for iteration in common:
            values = {
                (label.model, label.seed): _number(columns[name][places[iteration]])
                for (label, columns), places in zip(runs, at, strict=True)
            }
            estimates.append(mean_over(values, unit, bounds))
        found[name] = [None if e is None else short(e.mean) for e in estimates]
        if name not in COSTS:
            for place, end in enumerate(("low", "high")):
                found[f"{name}_{end}"] = [short(e.interval[place]) if e and e.interval else None for e in estimates]
    return found


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
