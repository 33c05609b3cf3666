"""Policies over five tokens: expectations are summed over the vocabulary, never sampled."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from skillsd.metrics import Metrics, add_metrics
from skillsd.objective import ESTIMATORS, Loss, Objective, TokenLogprobs

VOCAB = 5
SAMPLED = ["iw_k3", "iw_k1", "k1", "k2", "k3"]
EXACT = ["reverse_kl", "forward_kl"]

enough = settings(max_examples=60, deadline=None)
logits = st.lists(st.floats(-4, 4), min_size=VOCAB, max_size=VOCAB).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def log_policy(values: Tensor) -> Tensor:
    return F.log_softmax(values, dim=-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) by torch, whose arguments are (log b, log a)."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="sum")


def expected(name: str, student: Tensor, teacher: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over y ~ pi_old of an estimator's value, and of its gradient with respect to the student's logits.

    One token for each entry of the vocabulary, weighted by its probability under pi_old.
    """
    theta = student.clone().requires_grad_()
    log_p, log_q, log_old = log_policy(theta), log_policy(teacher), log_policy(old)
    rows = (VOCAB, VOCAB)
    terms = ESTIMATORS[name].terms(
        TokenLogprobs(log_p, log_p.expand(rows)), TokenLogprobs(log_q, log_q.expand(rows)), log_old
    )
    (log_old.exp() * terms.surrogate).sum().backward()
    assert theta.grad is not None
    return (log_old.exp() * terms.value).sum(), theta.grad


def exact(student: Tensor, teacher: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """KL and its gradient with respect to the student's logits, by autograd through torch's kl_div."""
    theta = student.clone().requires_grad_()
    log_p, log_q = log_policy(theta), log_policy(teacher)
    divergence = kl(log_p, log_q) if reverse else kl(log_q, log_p)
    divergence.backward()
    assert theta.grad is not None
    return divergence.detach(), theta.grad


def naive_iw_k3(logprob: Tensor, old: Tensor, teacher: Tensor) -> Tensor:
    """L_SDL as the paper writes it, left to autograd."""
    log_ratio = logprob - teacher
    return (logprob - old.detach()).exp() * ((-log_ratio).exp() - 1 + log_ratio)


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def differ(a: Tensor, b: Tensor, by: float = 1e-3) -> bool:
    return bool((a - b).abs().max() > by)


def masks(tokens: int, *, teacher: bool | list[bool] = True) -> dict[str, Tensor]:
    """Masks of action tokens, some or all of them with a teacher."""
    taught = [teacher] * tokens if isinstance(teacher, bool) else teacher
    return {
        "action_mask": torch.ones(tokens, dtype=torch.bool),
        "teacher_mask": torch.tensor(taught, dtype=torch.bool),
        "imitation_mask": torch.zeros(tokens, dtype=torch.bool),
    }


@dataclasses.dataclass
class Batch:
    """Random tokens of a student that has drifted from pi_old. `signals` are the tokens' signals."""

    theta: Tensor  # [tokens, vocab]
    chosen: Tensor
    signals: dict[str, Tensor]

    @classmethod
    def of(cls, tokens: int, taught: list[bool] | None = None, seed: int = 0) -> Batch:
        """Args: taught: which tokens have a teacher; all of them if None."""
        generator = torch.Generator().manual_seed(seed)
        theta, old, teacher = torch.randn(3, tokens, VOCAB, generator=generator, dtype=torch.float64)
        chosen = torch.randint(VOCAB, (tokens, 1), generator=generator)
        log_teacher = log_policy(teacher)
        signals = {
            "old_logprobs": log_policy(old).gather(1, chosen).squeeze(1),
            "advantages": torch.randn(tokens, generator=generator, dtype=torch.float64),
            "teacher_logprobs": log_teacher.gather(1, chosen).squeeze(1),
            "teacher_distribution": log_teacher,
            **masks(tokens, teacher=True if taught is None else taught),
        }
        return cls(theta, chosen, signals)

    def imitate(self, places: list[int]) -> Batch:
        """Turn these tokens into tokens to be imitated, which have no part in the other terms."""
        for name in ("action_mask", "teacher_mask"):
            self.signals[name][places] = False
        self.signals["imitation_mask"][places] = True
        return self

    def student(self, theta: Tensor, part: list[int]) -> TokenLogprobs:
        log_p = log_policy(theta[part])
        return TokenLogprobs(log_p.gather(1, self.chosen[part]).squeeze(1), log_p)

    def part(self, places: list[int]) -> dict[str, Tensor]:
        return {name: signal[places] for name, signal in self.signals.items()}

    def run(self, objective: Objective | Loss, parts: list[list[int]] | None = None) -> tuple[float, Tensor, Metrics]:
        """Loss, gradient ``[tokens, vocab]`` and metrics, accumulated over the micro-batches `parts`."""
        theta = self.theta.clone().requires_grad_()
        loss = objective.template.bind([self.signals]) if isinstance(objective, Objective) else objective
        total, metrics = 0.0, []
        for places in parts or [list(range(len(theta)))]:
            value, figures = loss(self.student(theta, places), self.part(places))
            value.backward()
            total += value.item()
            metrics.append(figures)
        assert theta.grad is not None
        return total, theta.grad, add_metrics(metrics)
