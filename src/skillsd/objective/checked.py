"""Checks on the results of loss terms and estimators, which may be a user's own code.

Shapes ``[tokens]``; a wrong shape would broadcast to a wrong loss, and a loss without gradient would train nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from skillsd.errors import UserError


def per_token(value: object, what: str, tokens: int) -> Tensor:
    """`value`, if it is a floating-point tensor ``[tokens]``; `what` names it in the error."""
    if not isinstance(value, Tensor) or value.shape != (tokens,) or not value.is_floating_point():
        raise UserError(f"{what} is {_shown(value)}, expected one floating-point number per token, [{tokens}]")
    return value


def losses_of(name: str, result: object, student: Tensor, weight: float) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The losses of a term and the values that it logs.

    Args:
        name: the term's.
        result: what its function returned.
        student: log-probs of the term's tokens, ``[tokens]``.
        weight: of the term; without one, no gradient is needed.

    Raises:
        UserError: if it is neither losses nor a pair of losses and a mapping, or has another shape or no gradient.
    """
    pair = isinstance(result, tuple)
    if pair and (len(result) != 2 or not isinstance(result[1], Mapping)):  # type: ignore[arg-type, index]
        raise UserError(
            f"the loss term {name!r} returned {_shown(result)}, expected losses [tokens], or a pair: losses and a "
            "mapping of values to log"
        )
    losses: object
    logged: Mapping[str, Any]
    losses, logged = result if pair else (result, {name: result})  # type: ignore[misc]
    # A term may leave tokens out: its losses are summed.
    if not isinstance(losses, Tensor) or losses.ndim != 1 or len(losses) > len(student):
        raise UserError(
            f"the result of the loss term {name!r} is {_shown(losses)}, expected one loss per token, [{len(student)}]"
        )
    if weight and student.requires_grad and not losses.requires_grad:
        raise UserError(
            f"the losses of the term {name!r} have no gradient: compute them from student.chosen or "
            "student.distribution, without detach() and no_grad(). For zeros, multiply these by 0"
        )
    for key, value in logged.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.ndim != 1 or value.is_complex():
            raise UserError(f"the loss term {name!r} logs {key!r} as {_shown(value)}, expected a tensor [tokens]")
    return losses, logged


def pair_of(name: str, result: object, tokens: int) -> tuple[Tensor, Tensor]:
    """The weight and the value, ``[tokens]`` each, from the equation of a sampled-token estimator."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise UserError(f"the estimator {name!r} returned {_shown(result)}, expected a pair: weight and value")
    weight, value = result
    return (
        per_token(weight, f"the weight of the estimator {name!r}", tokens),
        per_token(value, f"the value of the estimator {name!r}", tokens),
    )


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} ({', '.join(type(item).__name__ for item in value[:4])})"
    return f"of type {type(value).__name__}"
