"""Checks of a loaded model before anything is sampled or trained with it.

Everything is run as the engine will run it: packed passes with a separate output head, cached passes, a backward pass.
A model that would compute something else than its own code, or fail, is refused here instead of in the first iteration.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from torch import Tensor, nn

from skillsd.engines.base import TokenSequence
from skillsd.engines.torch import attention
from skillsd.engines.torch.forward import Network, recomputed_activations
from skillsd.engines.torch.memory import is_out_of_memory
from skillsd.errors import UserError
from skillsd.objective.logprobs import WHOLE

MAX_REACH = 512
"""Windows of at most this many tokens are checked beyond their end; larger ones by what the layers ask for."""

COMPARED = 4
"""Tokens at the end of each sequence whose predictions are compared."""


def verify_model(model: nn.Module, network: Network, name: str) -> None:
    """Compare both attention plans, and the separate output head, with the model's own eager forward pass.

    Catches attention that the plans don't implement (distance biases, sinks, soft caps), models that mix tokens in
    other ways (convolutions, recurrent states), windows that never reach the attention, and random computations, which
    would otherwise train wrongly without an error.

    Args:
        model: with its adapters, in evaluation mode.
        network: runs it.

    Raises:
        UserError: if the results differ, change from pass to pass, or the model can't be run.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"model {name!r} is not supported: it has layers of type {', '.join(sorted(unknown))}")
    sequences = _sequences(config, network.vocabulary)
    try:
        with torch.inference_mode():
            packed, again = _packed(network, sequences), _packed(network, sequences)
            cached = _cached(network, sequences)
            plain = _plain(model, network, sequences)
            windows = _windows(network)
        if trained := [p for p in model.parameters() if p.requires_grad]:
            with recomputed_activations(model):
                value = _packed(network, sequences[1:]).sum()
                torch.autograd.grad(value, [min(trained, key=torch.numel)], allow_unused=True)
    except UserError:
        raise
    except Exception as error:  # model code can raise anything: KeyError, AttributeError ...
        if is_out_of_memory(error):
            raise
        raise UserError(f"model {name!r} can't be run on packed sequences: {error!r}") from error
    if len(windows) != config.num_hidden_layers:
        raise UserError(
            f"model {name!r} is not supported: only {len(windows)} of its {config.num_hidden_layers} layers use the "
            "attention interface of transformers"
        )
    exact = next(model.parameters()).dtype == torch.float32
    what, limit = ("log-probs", 1e-3) if exact else ("predicted distributions", 0.05)
    if torch.isnan(plain).any():
        raise UserError(
            f"model {name!r} predicts nan: its weights are damaged, or overflow in {next(model.parameters()).dtype}"
        )
    # Some GPU kernels sum in no fixed order.
    if difference(packed, again, exact=exact) > (0 if network.device.type == "cpu" else limit):
        raise UserError(f"model {name!r} is not supported: two passes over the same tokens give different log-probs")
    gap = difference(torch.cat([plain, plain]), torch.cat([packed, cached]), exact=exact)
    if not gap < limit:
        raise UserError(
            f"model {name!r} is not supported: its {what} on packed sequences differ from those of its own attention "
            f"(by up to {gap:.3g}, expected less than {limit})"
        )
    _check_windows(config, windows, name)


def difference(expected: Tensor, found: Tensor, *, exact: bool) -> float:
    """How far two tensors of log-probs ``[tokens, vocab]`` are from each other, at most.

    Args:
        exact: both are float32: the largest difference between single log-probs. Otherwise the largest mean over the
            vocabulary, weighted by probability (a KL divergence): below float32, rounding makes single log-probs of two
            correct computations differ by up to 0.7 on a real model, and this mean by 0.01.
    """
    gaps = torch.where(expected == found, 0.0, expected - found)  # impossible tokens are at -inf in both
    return (gaps.abs().max() if exact else (expected.exp() * gaps).sum(-1).max()).item()


def probe(vocabulary: int, length: int) -> tuple[int, ...]:
    """Random ids from all over the vocabulary, the same in every process."""
    rng = random.Random(0)
    return tuple(rng.randrange(vocabulary) for _ in range(length))


def _sequences(config: Any, vocabulary: int) -> list[TokenSequence]:
    """Two sequences, the first longer than the windows and chunks of the configuration, up to `MAX_REACH`."""
    limits = [size for name, size in vars(config).items() if re.search("window|chunk", name) and isinstance(size, int)]
    reach = max((size for size in limits if size <= MAX_REACH), default=0)
    longest = int(getattr(config, "max_position_embeddings", None) or MAX_REACH)
    lengths = [max(9, min(reach + 2 * COMPARED, longest)), 7]
    ids = probe(vocabulary, sum(lengths))
    return [
        TokenSequence(part, (*[False] * (len(part) - COMPARED), *[True] * COMPARED))
        for part in (ids[: lengths[0]], ids[lengths[0] :])
    ]


def _packed(network: Network, sequences: list[TokenSequence]) -> Tensor:
    return network.forward(sequences, [0] * len(sequences), 1.0, WHOLE)[1]


def _cached(network: Network, sequences: list[TokenSequence]) -> Tensor:
    """The same predictions, in two passes with a KV cache, one row per sequence."""
    starts = [len(s.tokens) - COMPARED - 1 for s in sequences]
    pool = attention.KVPool()
    pool.reserve(2, max(len(s.tokens) for s in sequences))

    def feed(parts: list[tuple[int, ...]], first: list[int], places: list[int]) -> Tensor:
        plan = attention.CachedPlan(pool, [0, 1], first, [len(part) for part in parts], network.device)
        ids = torch.tensor([token for part in parts for token in part], device=network.device)
        logits = network.decode(ids, plan, torch.tensor(places, dtype=torch.long, device=network.device))
        if len(logits) != len(places):
            raise NotImplementedError("it does not honour logits_to_keep")
        return logits.float().log_softmax(-1)

    feed([s.tokens[:start] for s, start in zip(sequences, starts, strict=True)], [0, 0], [])
    rest = [s.tokens[start:-1] for s, start in zip(sequences, starts, strict=True)]
    return feed(rest, starts, list(range(2 * COMPARED)))


def _plain(model: nn.Module, network: Network, sequences: list[TokenSequence]) -> Tensor:
    """The same predictions by the model's own attention, one sequence at a time."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    rows = []
    try:
        for sequence in sequences:
            ids = torch.tensor([sequence.tokens], device=network.device)
            # A long row of logits over a large vocabulary would take gigabytes.
            some = {"logits_to_keep": COMPARED + 1} if ids.shape[1] > 64 else {}
            rows.append(model(input_ids=ids, use_cache=False, **some).logits[0, -COMPARED - 1 : -1])
    finally:
        model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    return torch.cat(rows)[:, : network.vocabulary].float().log_softmax(-1)


def _windows(network: Network) -> dict[int, int | None]:
    """Layer -> the window that it asks for, of the layers that use the attention interface."""
    plan = attention.PackedPlan([2], network.device)
    ids = torch.tensor([probe(network.vocabulary, 2)], device=network.device)
    network.split.hidden(network.run, input_ids=ids, position_ids=plan.positions, use_cache=False, plan=plan)
    return plan.windows


def _check_windows(config: Any, windows: dict[int, int | None], name: str) -> None:
    """Compare windows that are too large to be tried with what the layers ask for."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= MAX_REACH:
        return
    types = getattr(config, "layer_types", None)
    for layer, asked in sorted(windows.items()):
        expected = None if types and types[layer] == "full_attention" else window
        if asked != expected:
            raise UserError(
                f"model {name!r} is not supported: its configuration gives layer {layer} a window of {expected} "
                f"tokens, but the layer asks for {asked}"
            )
