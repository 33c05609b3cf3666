"""A loss as a sum of terms, each a weighted sum over its tokens, divided by their number in the whole minibatch.

A term is data: a name, a weight, the mask of its tokens, and a function. The counts are derived from the masks in one
place (`LossTemplate.bind`), so the gradient does not depend on micro-batches, and a new term is one function and one
row.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skillsd.metrics import BINS_PER_DECADE, INFINITE_BIN, ZERO_BIN, Histogram, Mean, Metrics, PerToken
from skillsd.objective.checked import losses_of
from skillsd.objective.logprobs import CHOSEN, TokenLogprobs, Want, at_least_float32, log_difference

ACTION_MASK = "action_mask"
"""Signal: tokens that the policy sampled in this iteration, bool ``[tokens]``."""
TEACHER_MASK = "teacher_mask"
"""Signal: action tokens with a teacher's log-prob, bool ``[tokens]``."""
IMITATION_MASK = "imitation_mask"
"""Signal: tokens of earlier successes to imitate, bool ``[tokens]``; disjoint from the action tokens."""

TOKEN_NUMBER = "token_number"
"""Signal: the token's number in the training batch, int64 ``[tokens]``; used only by `Loss.per_token`."""

STUDENT_LOGPROBS = "per_token/student_logprobs"
"""Metric, `PerToken`: the student's log-prob of each token."""
DIVERGENCE = "per_token/distil_value"
"""Metric, `PerToken`: the value of L_SDL's estimator at each token with a teacher."""
SAMPLER_DIFF = "sampler_trainer_logprob_diff"
"""Metric: histogram of |log-prob of the student - log-prob that the sampler reported|, over action tokens."""

TermFunction = Callable[[TokenLogprobs, Mapping[str, Tensor]], Tensor | tuple[Tensor, Mapping[str, Tensor]]]
"""(student's log-probs, signals), both at the term's tokens only -> losses ``[tokens]`` with gradient, which are
summed; or (losses, values to log), name -> ``[tokens]``, whose means become metrics."""


@dataclass(frozen=True)
class LossTerm:
    """One additive term: ``weight * sum over its tokens of fn / count``.

    Attributes:
        name: for error messages; also the metric's name if `fn` returns no values to log.
        weight: of the term. With 0 the term's metrics are still logged.
        mask: name of a boolean signal ``[tokens]``: the tokens that the term applies to.
        fn: must be picklable (a module's function or a frozen dataclass) and pure.
        normaliser: name of the mask whose count over the whole minibatch divides the sum; None is `mask`.
    """

    name: str
    weight: float
    mask: str
    fn: TermFunction
    normaliser: str | None = None

    @property
    def counted(self) -> str:
        """The mask whose count divides the sum."""
        return self.normaliser or self.mask


@dataclass(frozen=True)
class Loss:
    """The loss of one minibatch: pure and picklable, so that it can run in another process.

    Attributes:
        terms: summed in this order.
        counts: mask -> number of its tokens in the whole minibatch.
        want: which log-probs of the student the terms need.
        compare_with_sampler: also log `SAMPLER_DIFF`. Only meaningful before the first update after sampling, while
            both log-probs come from the same weights.
        per_token: also log `STUDENT_LOGPROBS` and `DIVERGENCE`; needs the signal `TOKEN_NUMBER`.
    """

    terms: tuple[LossTerm, ...]
    counts: Mapping[str, int]
    want: Want = CHOSEN
    compare_with_sampler: bool = False
    per_token: bool = False

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """A micro-batch's share of the loss, a scalar to back-propagate, and its metrics.

        Args:
            student: log-probs at the marked tokens, with gradient.
            signals: of the same tokens, ``[tokens, ...]`` each.

        Raises:
            ValueError: if a signal has another shape, or a mask has more tokens here than in the whole minibatch.
        """
        _check_aligned(student.chosen, signals)
        total: Tensor | None = None
        metrics: Metrics = {}
        for term in self.terms:
            mask = signals[term.mask]
            present = int(mask.sum())
            if not present:
                continue
            count = self.counts[term.counted]
            here = present if term.counted == term.mask else int(signals[term.counted].sum())
            if count < here:
                raise ValueError(
                    f"{term.name}: {here} tokens of {term.counted} in this micro-batch, but {count} in the whole "
                    "minibatch: bind the loss to the signals of all its items"
                )
            # Select instead of multiplying by the mask: the values at other tokens, even nan, are never used.
            everywhere = present == len(mask)
            of_term = signals if everywhere else {name: signal[mask] for name, signal in signals.items()}
            own = student if everywhere else student.at(mask)
            losses, logged = losses_of(term.name, term.fn(own, of_term), own.chosen, term.weight)
            part = term.weight * losses.sum() / max(count, 1)
            total = part if total is None else total + part
            metrics |= means(logged)
            # A clamp leaves tokens out: then it is unknown which ones the values belong to.
            values = logged.get("distil_value")
            if self.per_token and values is not None and len(values) == present:
                metrics[DIVERGENCE] = per_token(of_term[TOKEN_NUMBER], values)
        if self.compare_with_sampler and bool(signals[ACTION_MASK].any()):
            acted = signals[ACTION_MASK]
            metrics[SAMPLER_DIFF] = histogram(log_difference(student.chosen[acted], signals["old_logprobs"][acted]))
        if self.per_token:
            metrics[STUDENT_LOGPROBS] = per_token(signals[TOKEN_NUMBER], student.chosen)
        return student.chosen.sum() * 0.0 if total is None else total, metrics


@dataclass(frozen=True)
class LossTemplate:
    """A loss without the counts of a minibatch."""

    terms: tuple[LossTerm, ...]
    want: Want = CHOSEN

    def bind(
        self, batch: Iterable[Mapping[str, Tensor]], *, compare_with_sampler: bool = False, per_token: bool = False
    ) -> Loss:
        """The loss of a minibatch, with the counts derived from its masks.

        Args:
            batch: the signals of each of its items.
            compare_with_sampler, per_token: see `Loss`.
        """
        items = list(batch)
        masks = {name for term in self.terms for name in (term.mask, term.counted)}
        counts = {name: sum(int(signals[name].sum()) for signals in items) for name in sorted(masks)}
        # More than the chosen tokens' log-probs is needed only to compare with a teacher.
        want = self.want if counts.get(TEACHER_MASK, 0) else CHOSEN
        return Loss(self.terms, counts, want, compare_with_sampler, per_token)


def means(values: Mapping[str, Tensor]) -> Metrics:
    """The means of vectors ``[tokens]``, with one transfer from the device per length. Empty vectors are left out."""
    found: Metrics = {}
    lengths = {len(value) for value in values.values()}
    for length in sorted(lengths - {0}):
        same = {name: value for name, value in values.items() if len(value) == length}
        vectors = [at_least_float32(value.detach()) * 1.0 for value in same.values()]  # * 1.0: a mask becomes a share
        rows = torch.stack([torch.stack([x.sum(), x.amin(), x.amax()]) for x in vectors]).tolist()
        found |= {name: Mean(row[0], length, row[1], row[2]) for name, row in zip(same, rows, strict=True)}
    return {name: found[name] for name in values if name in found}


def histogram(values: Tensor) -> Histogram:
    """The histogram of the absolute values of ``[tokens]``."""
    if not len(values):
        return Histogram()
    sizes = values.detach().abs().double().nan_to_num(nan=torch.inf, posinf=torch.inf)
    bins = (sizes.clamp(1e-30, 1e30).log10() * BINS_PER_DECADE).floor().long()
    bins[sizes == 0] = ZERO_BIN
    bins[sizes.isinf()] = INFINITE_BIN
    numbers, counts = torch.unique(bins, return_counts=True)
    return Histogram(dict(zip(numbers.tolist(), counts.tolist(), strict=True)), float(sizes.max()))


def per_token(numbers: Tensor, values: Tensor) -> PerToken:
    """Values ``[tokens]`` with the tokens' numbers ``[tokens]``."""
    return PerToken(
        array("q", numbers.cpu().numpy().tobytes()), array("f", values.detach().float().cpu().numpy().tobytes())
    )


def _check_aligned(logprobs: Tensor, signals: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a signal with an extra axis, which would silently broadcast to a wrong loss."""
    for name, signal in signals.items():
        if logprobs.ndim != 1 or signal.shape[:1] != logprobs.shape or (signal.ndim > 1 and name not in WIDE_SIGNALS):
            raise ValueError(
                f"the signal {name} has shape {list(signal.shape)}, but the log-probs {list(logprobs.shape)}: expected "
                "one value per token"
            )


WIDE_SIGNALS = frozenset({"teacher_distribution", "candidates"})
"""Signals with more than one number per token."""
