"""The update: minibatches of whole groups, a step each, and nothing from anything that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skillsd.engines.base import TrainItem
from skillsd.metrics import Mean, add_metrics
from skillsd.objective import Objective, TokenLogprobs
from skillsd.seeds import derive_seed
from skillsd.training.batches import Batch, minibatches, normalisers

if TYPE_CHECKING:
    from skillsd.training.run import Run

GAP_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def optimise(run: Run, batch: Batch, objective: Objective, note: Callable[[str], None]) -> dict[str, float]:
    """Update the student on `batch`; returns figures for the log.

    A step whose loss or gradient is not finite updates nothing; its minibatch is saved under ``not-finite/`` in the
    run's folder for inspection, and `note` says so.
    """
    options = run.config.training
    parts: list[Mapping[str, Mean]] = []
    gaps: list[Tensor] = []
    norms: list[float] = []
    refused = 0
    for epoch in range(options.epochs):
        order = derive_seed(run.config.seed, "minibatches", run.iteration, epoch)
        for place, items in enumerate(minibatches(batch, options.minibatches, order)):
            # Before the first step a student that acted is pi_old: what differs is the sampler from the scorer.
            watched = gaps if epoch == place == 0 and run.method.sampler == "student" else None
            parts.append(
                run.engine.forward_backward(
                    items,
                    _loss(objective, normalisers(items), watched),
                    temperature=run.config.rollout.temperature,
                    distribution=objective.needs_distribution and any(batch.taught),
                )
            )
            report = run.engine.step(run.learning_rate())
            if report.applied:
                norms.append(report.grad_norm)
                continue
            refused += 1
            path = run.folder / "not-finite" / f"iteration-{run.iteration + 1}-epoch-{epoch}-minibatch-{place}.pt"
            _save_aside(items, path)
            note(f"loss or gradient not finite: nothing was updated; the minibatch is in {path}")
    means = add_metrics(parts)
    figures = {name: mean.value for name, mean in means.items()}
    if "ratio" in means:
        figures["ratio_max"] = means["ratio"].high
    return {
        **{f"loss/{name}": value for name, value in figures.items()},
        "loss/lambda_sdl": objective.lambda_sdl,
        **_gap_quantiles(gaps),
        "step/grad_norm": sum(norms) / len(norms) if norms else float("nan"),
        "step/learning_rate": run.learning_rate(),
        "step/applied": float(len(norms)),
        "step/refused": float(refused),
    }


def _loss(objective: Objective, counts: Mapping[str, float], gaps: list[Tensor] | None) -> Any:
    def loss(student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Mean]]:
        if gaps is not None:
            own = ~signals["imitated"]
            gaps.append((student.chosen.detach() - signals["old_logprobs"])[own].abs().cpu())
        return objective(student, signals, counts)

    return loss


def _gap_quantiles(gaps: Sequence[Tensor]) -> dict[str, float]:
    """|log-prob when sampled - log-prob when trained| over the action tokens, same weights: the two engines' drift."""
    if not gaps:
        return {}
    ordered = torch.cat(list(gaps)).sort().values  # torch.quantile takes no more than 16M values
    last = len(ordered) - 1
    return {f"gap/{name}": float(ordered[round(q * last)]) for name, q in GAP_QUANTILES.items()}


def _save_aside(items: Sequence[TrainItem], path: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save(
        [{"tokens": i.sequence.tokens, "mask": i.sequence.mask, "signals": dict(i.signals)} for i in items], path
    )
