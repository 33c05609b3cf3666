"""Does an engine keep the promises of `skillsd.engines.base`? For anyone who writes one.

    from skillsd.engines import conformance

    conformance.assert_conforms(conformance.subject_of(MyOptions(name="mine"), "path/of/a/tiny/model"))

Each check is a coroutine function of a `Subject`. One about a capability that the engine lacks is skipped, visibly. To
see every check as a test of its own: ``@pytest.mark.parametrize("check", conformance.CHECKS)`` and
`run_check`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from skillsd.engines.base import Engine
from skillsd.engines.conformance import learning, sampling, scoring
from skillsd.engines.conformance.kit import SkippedCheck, Subject
from skillsd.engines.options import EngineOptions, EngineSpec

Check = Callable[[Subject], Awaitable[None]]

CHECKS: tuple[Check, ...] = (
    sampling.seed_determines_the_sample,
    sampling.same_request_twice_at_once,
    sampling.sampled_logprobs_are_scored_logprobs,
    sampling.bad_requests_are_refused,
    sampling.sampling_follows_the_published_weights,
    sampling.published_weights_sample_while_others_are_trained,
    sampling.teacher_is_sampled,
    scoring.logprobs_are_the_models,
    scoring.distribution_is_the_models,
    scoring.order_and_micro_batches_do_not_matter,
    scoring.top_k_is_the_head_of_the_distribution,
    scoring.long_sequences_are_refused,
    learning.gradient_does_not_depend_on_micro_batches,
    learning.metrics_by_token_come_back_whole,
    learning.gradients_accumulate,
    learning.training_moves_towards_the_loss,
    learning.candidates_coarse_grain_the_distribution,
    learning.what_is_not_finite_is_refused,
    learning.snapshot_teacher_stays,
    learning.averaged_teacher_is_between,
    learning.following_teacher_is_never_stale,
    learning.restored_state_goes_on_bit_for_bit,
)

OF_ARCHITECTURE: tuple[Check, ...] = (
    sampling.sampled_logprobs_are_scored_logprobs,
    scoring.logprobs_are_the_models,
    scoring.distribution_is_the_models,
    learning.gradient_does_not_depend_on_micro_batches,
    learning.snapshot_teacher_stays,
)
"""Those that depend on how a model computes; the others are the engine's own, whatever the model."""


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        message: which promise is broken, or why the check was skipped.
    """

    check: str
    outcome: Literal["kept", "broken", "skipped"]
    message: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:8} {self.check}" + (f": {self.message}" if self.message else "")


def run_check(check: Check, subject: Subject) -> None:
    """Run one check.

    Raises:
        AssertionError: with the promise that is broken.
        SkippedCheck: if the engine lacks the capability that the check is about.
    """
    asyncio.run(_awaited(check, subject))


async def _awaited(check: Check, subject: Subject) -> None:
    await check(subject)


def examine(subject: Subject, checks: Sequence[Check] = CHECKS) -> list[Result]:
    """Run all checks; what an engine raises unexpectedly counts as a broken promise."""
    results = []
    for check in checks:
        name = check.__name__
        try:
            run_check(check, subject)
        except SkippedCheck as skipped:
            results.append(Result(name, "skipped", str(skipped)))
        except AssertionError as broken:
            results.append(Result(name, "broken", str(broken)))
        except Exception as error:
            results.append(Result(name, "broken", f"{type(error).__name__}: {error}"))
        else:
            results.append(Result(name, "kept"))
    return results


def assert_conforms(subject: Subject, checks: Sequence[Check] = CHECKS) -> list[Result]:
    """Run all checks; returns the results if no promise is broken.

    Raises:
        AssertionError: with every promise that is broken.
    """
    results = examine(subject, checks)
    broken = [str(result) for result in results if result.outcome == "broken"]
    if broken:
        raise AssertionError(f"{len(broken)} of {len(results)} promises are broken:\n" + "\n".join(broken))
    return results


def subject_of(options: EngineOptions, model: str | Path, **details: Any) -> Subject:
    """The engine of `options` with a model folder, compared with plain forward passes of ``transformers``.

    Args:
        details: of the `Subject`: tolerance, relative, batch_invariant, tokens.
    """
    spec = EngineSpec(model=str(model), seed=0, device="cpu")

    def make(*, snapshot_teacher: bool = False, micro_batch_tokens: int = 8192) -> Engine:
        teacher: Literal["snapshot", "student"] = "snapshot" if snapshot_teacher else "student"
        return options.build(replace(spec, teacher=teacher, micro_batch_tokens=micro_batch_tokens))

    return Subject(make, **{"reference": plain_logprobs(model), **details})


def plain_logprobs(model: str | Path) -> Callable[[Sequence[int]], Tensor]:
    """Token ids -> log-probs ``[tokens, vocab]``, one sequence and one forward pass at a time."""
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    def logprobs(tokens: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    return logprobs


__all__ = [
    "CHECKS",
    "OF_ARCHITECTURE",
    "Check",
    "Result",
    "SkippedCheck",
    "Subject",
    "assert_conforms",
    "examine",
    "plain_logprobs",
    "run_check",
    "subject_of",
]
