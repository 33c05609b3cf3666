"""Sequences as the SDK's data, and its answers as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tinker import types
from torch import Tensor

from skillsd.engines.base import TokenSequence
from skillsd.engines.tinker.gradient import Share


def prompt(tokens: Sequence[int]) -> Any:
    """Token ids as a prompt."""
    return types.ModelInput.from_ints(list(tokens))


def to_score(sequence: TokenSequence) -> Any:
    """A sequence whose log-probs are wanted: a datum of the loss ``cross_entropy``."""
    return _datum(sequence, weights=torch.tensor(sequence.mask[1:]).float())


def to_train(shares: Sequence[Share], *, sums: bool) -> list[Any]:
    """Data of the loss ``importance_sampling``.

    Args:
        sums: the server sums over tokens and sequences. Otherwise it takes means over both, which is undone here; the
            shares must then be all of the step's.
    """
    return [_to_train(share, 1.0 if sums else len(shares) * (len(share.sequence.tokens) - 1)) for share in shares]


def _to_train(share: Share, scale: float) -> Any:
    mask = torch.tensor(share.sequence.mask[1:])
    zeros = torch.zeros(len(mask))
    return _datum(
        share.sequence,
        logprobs=zeros.masked_scatter(mask, share.logprobs.float()),
        advantages=zeros.masked_scatter(mask, share.advantages.float() * scale),
    )


def _datum(sequence: TokenSequence, **inputs: Tensor) -> Any:
    """The model reads all tokens but the last, and predicts all but the first."""
    inputs["target_tokens"] = torch.tensor(sequence.tokens[1:])
    return types.Datum(
        model_input=prompt(sequence.tokens[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
    )


def logprobs(answer: Any, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """The log-probs of the marked tokens, ``[marked]`` float32 for each sequence, of a pass over them."""
    found = []
    for sequence, output in zip(sequences, answer.loss_fn_outputs, strict=True):
        mask = torch.tensor(sequence.mask[1:])
        found.append(output["logprobs"].to_torch().float().flatten()[: len(mask)][mask])
    return found


def sampling(temperature: float, max_tokens: int, seed: int, stop: Sequence[int]) -> Any:
    """Parameters of a sample from the whole distribution: no top-k, no top-p."""
    return types.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed % (1 << 31), stop=list(stop))


def adam(learning_rate: float, betas: tuple[float, float], weight_decay: float, max_grad_norm: float) -> Any:
    """AdamW with torch's epsilon; an infinite norm clips nothing."""
    return types.AdamParams(
        learning_rate=learning_rate,
        beta1=betas[0],
        beta2=betas[1],
        eps=1e-8,
        weight_decay=weight_decay,
        grad_clip_norm=max_grad_norm if max_grad_norm < float("inf") else 0.0,
    )
