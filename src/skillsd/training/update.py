"""The update: one optimiser step per minibatch of whole groups; non-finite losses and gradients update nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skillsd.engines.base import TrainItem
from skillsd.files.write import make_folder, replacing
from skillsd.metrics import Histogram, Mean, Metrics, PerToken, add_metrics
from skillsd.objective import SAMPLER_DIFF, Objective
from skillsd.seeds import derive_seed
from skillsd.training.batch import Batch, minibatches

if TYPE_CHECKING:
    from skillsd.training.run import Run

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Updated:
    """What an update did.

    Attributes:
        figures: its metrics.
        steps: group -> (minibatch, whether its step was applied), in the first epoch. Groups without tokens may be
            missing.
        per_token: the loss's metrics of single tokens, in the first epoch, if they were wanted.
    """

    figures: dict[str, float]
    steps: Mapping[int, tuple[int, bool]] = field(default_factory=dict)
    per_token: Mapping[str, PerToken] = field(default_factory=dict)


async def update(
    run: Run,
    batch: Batch,
    objective: Objective,
    note: Callable[[str], None],
    *,
    per_token: bool = False,
    on_policy: bool = True,
) -> Updated:
    """Train the student on `batch`.

    A step with a non-finite loss or gradient updates nothing. Its minibatch is saved in the folder ``not-finite`` of
    the run for inspection, and `note` is called with a message.

    Args:
        per_token: also return the metrics of single tokens. They are by-products of the training pass.
        on_policy: whether the current weights sampled.
    """
    options = run.config.training
    template = objective.template
    parts: list[Metrics] = []
    norms: list[float] = []
    steps: dict[int, tuple[int, bool]] = {}
    applied = refused = 0
    for epoch in range(options.epochs):
        order = derive_seed(run.config.seed, "minibatches", run.iteration, epoch)
        for place, members in enumerate(minibatches(batch, options.minibatches, order)):
            items = [item for member in members for item in batch.groups[member]]
            # Before the first step a student that sampled is still pi_old, so its log-probs should be the sampler's.
            before_update = on_policy and epoch == place == 0 and run.method.sampler == "student"
            loss = template.bind(
                (item.signals for item in items),
                compare_with_sampler=before_update,
                per_token=per_token and epoch == 0,
            )
            parts.append(await run.learner.forward_backward(items, loss, temperature=run.config.rollout.temperature))
            report = await run.learner.step(run.learning_rate())
            if epoch == 0:
                steps |= dict.fromkeys(members, (place, report.applied))
            if report.applied:
                applied += 1
                norms += [] if report.grad_norm is None else [report.grad_norm]
                continue
            refused += 1
            path = run.folder / "not-finite" / f"iteration-{run.iteration + 1}-epoch-{epoch}-minibatch-{place}.pt"
            _save_minibatch(items, path)
            note(f"loss or gradient not finite: this step updated nothing; its minibatch is in {path}")
    metrics = add_metrics(parts)
    figures = {
        **_figures(metrics),
        "loss/lambda_sdl": objective.lambda_sdl,
        "step/grad_norm": sum(norms) / len(norms) if norms else float("nan"),
        "step/learning_rate": run.learning_rate(),
        "step/applied": float(applied),
        "step/refused": float(refused),
    }
    return Updated(figures, steps, {name: m for name, m in metrics.items() if isinstance(m, PerToken)})


def _figures(metrics: Metrics) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, metric in metrics.items():
        if isinstance(metric, Mean):
            figures[f"loss/{name}"] = metric.value
    if isinstance(ratio := metrics.get("ratio"), Mean):
        figures["loss/ratio_max"] = ratio.high
    if isinstance(difference := metrics.get(SAMPLER_DIFF), Histogram):
        figures |= {f"{SAMPLER_DIFF}/{name}": difference.quantile(q) for name, q in QUANTILES.items()}
    return figures


def _save_minibatch(items: Sequence[TrainItem], path: Path) -> None:
    content = [{"tokens": i.sequence.tokens, "mask": i.sequence.mask, "signals": dict(i.signals)} for i in items]
    make_folder(path.parent)
    with replacing(path, by_library=True) as aside:
        torch.save(content, aside)
