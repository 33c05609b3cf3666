"""Decoding in passes of fixed shape, several tokens between two looks by the host.

On a GPU a small pass is limited by its launches (13 to 30 microseconds each, a thousand a token) and by waiting for
results. Here the state of all sessions is one tensor on the device: the host writes it, lets some steps run, each of
which samples a token for every slot and updates the state, and reads the results. Nothing in between waits for the
device, so that a step can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from skillsd.engines.torch.graphs import CudaCapture, GraphedSteps
from skillsd.engines.torch.sampling import check_finite, pick
from skillsd.engines.torch.static_plan import StaticPlan
from skillsd.engines.torch.steps import Forward, PlainSteps, Session, Steps

Kind = Literal["auto", "plain", "static"]
"""``plain`` or ``static`` steps; ``auto``: static on a GPU, plain on a CPU."""

STEPS = 8
"""The most steps between two looks by the host.

A look costs about half a millisecond (copies, bookkeeping) and a session whose turn ends by a stop token waits for the
rest of the steps, 3.5 on average: with steps of 2 to 3 ms, both are 3 % or less for turns of 100 tokens or more. Turns
that end by their length end exactly there, so moves of one token are read at once.
"""

WIDTHS = (16, 32, 64)
"""New tokens a slot of a prefill step. Longer observations, and prompts, are prefilled by passes of their own shape."""

MOST_PADDED, CHEAP_PADDED = 8192, 1024
"""Tokens of a prefill step, padding included: at most the first, and at most three times the tokens without padding
unless they are as few as the second, for which launches would take longer than the padding."""

KEPT_SHARE = 1 / 16
"""Keys and values are kept during scoring and training if they take no more than this share of the device's memory:
then the graphs, which hold their addresses, are captured once in a run and not in every iteration."""

# Rows of the state. Temperatures and uniform numbers are float64 in the same 8 bytes.
_ID, _POSITION, _ACTIVE, _TEMPERATURE, _STEP, _UNIFORMS = range(6)
_ROW, _START, _COUNT, _IDS = range(4)


def bucket(size: int) -> int:
    """The smallest 2^n or 3 * 2^n that is at least `size`."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


class StaticSteps(Steps):
    """Decode and prefill steps of fixed shape: buckets of (slots, new tokens a slot, length of the cache).

    Args:
        vocabulary: number of logits.
        most: the most sessions.
        attention: a key of `static_plan.ATTENTION`.
        graphs: captures the steps; None runs them directly.
        kept_bytes: the most memory of keys and values that `release` keeps.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        *,
        vocabulary: int,
        most: int,
        attention: str,
        graphs: GraphedSteps | None = None,
        kept_bytes: int = 0,
    ) -> None:
        super().__init__(forward, device)
        self._attention, self._graphs, self._kept_bytes = attention, graphs, kept_bytes
        self._most = most
        self._stops = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._state = torch.zeros(_UNIFORMS + STEPS, self._most, dtype=torch.long, device=device)
        self._results = torch.zeros(2, STEPS, self._most, dtype=torch.long, device=device)  # ids; float64 log-probs
        self._new = torch.zeros(_IDS + WIDTHS[-1], self._most, dtype=torch.long, device=device)
        self._allocations = 0  # of the pool, when the graphs were captured

    def set_stop_tokens(self, tokens: frozenset[int]) -> None:
        stops = torch.zeros(len(self._stops), dtype=torch.bool)
        stops[[token for token in tokens if token < len(stops)]] = True
        self._stops.copy_(stops)

    # -- memory -------------------------------------------------------------------------------------------------

    def reserve(self, rows: int, length: int) -> None:
        super().reserve(self._slots(rows) + 1, length)  # one scrap row

    def rows_read(self, sessions: int) -> int:
        return self._slots(sessions)

    def release(self) -> None:
        if self.pool.bytes() > self._kept_bytes:
            self._forget_graphs()
            super().release()

    def reset(self) -> None:
        self._forget_graphs()
        super().reset()

    def _forget_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    def _run(self, kind: str, slots: int, new: int, length: int) -> None:
        if self.pool.allocations != self._allocations:
            self._forget_graphs()
            self._allocations = self.pool.allocations
        step = partial(self._decode_step if kind == "decode" else self._prefill_step, slots, new, length)
        if self._graphs is None:
            step()
        else:
            self._graphs.run(kind, (slots, new, length), step)

    def _slots(self, needed: int) -> int:
        return min(bucket(needed), self._most)

    def _length(self, needed: int) -> int:
        """Keys to read of each slot."""
        return min(bucket(max(needed, self.pool.GROWTH)), self.pool.capacity)

    def _send(self, state: Tensor, filled: Tensor) -> None:
        """Copy the first rows of a state to the device, without waiting for it."""
        if state.is_cuda:
            filled = filled.pin_memory()
        state[: len(filled)].copy_(filled, non_blocking=True)

    # -- decoding -----------------------------------------------------------------------------------------------

    def decode(self, sessions: Sequence[Session]) -> list[list[tuple[int, float]]]:
        steps = min(STEPS, *(session.remaining for session in sessions))
        rows = [session.row for session in sessions]
        state = torch.zeros(_UNIFORMS + steps, self._most, dtype=torch.long)
        floats = state.view(torch.float64)
        state[_ID, rows] = torch.tensor([session.tokens[-1] for session in sessions])
        state[_POSITION, rows] = torch.tensor([session.cached for session in sessions])
        state[_ACTIVE, rows] = 1
        floats[_TEMPERATURE, rows] = torch.tensor([s.active.temperature for s in sessions], dtype=torch.float64)
        numbers = [[session.rng.random() for _ in range(steps)] for session in sessions]
        floats[_UNIFORMS:, rows] = torch.tensor(numbers, dtype=torch.float64).T
        self._send(self._state, state)
        slots = self._slots(rows[-1] + 1)
        length = self._length(max(session.cached for session in sessions) + steps)
        for _ in range(steps):
            self._run("decode", slots, 1, length)
        ids, logprobs = self._results.cpu()  # the one place that waits for the device
        by_row, logprobs_by_row = ids[:steps].T.tolist(), logprobs.view(torch.float64)[:steps].T.tolist()
        found = []
        for session in sessions:
            pairs = [
                (token, logprob)
                for token, logprob in zip(by_row[session.row], logprobs_by_row[session.row], strict=True)
                if token >= 0
            ]
            check_finite([logprob for _, logprob in pairs])
            session.cached += len(pairs)
            found.append(pairs)
        return found

    def _decode_step(self, slots: int, new: int, length: int) -> None:
        """Sample a token for the first `slots` rows, as far as they are active, and advance the state. `new` is 1."""
        state = self._state[:, :slots]
        ids, position, active, step = state[_ID], state[_POSITION], state[_ACTIVE], self._state[_STEP, :1]
        floats = self._state.view(torch.float64)[:, :slots]
        plan = StaticPlan(self.pool, None, position, active, new, length, self._attention)
        logits = self.forward(ids, plan, None)
        uniforms = floats[_UNIFORMS:].index_select(0, step)[0]
        chosen, logprobs = pick(logits, floats[_TEMPERATURE].float(), uniforms)
        is_active = active > 0
        result = torch.stack([chosen.masked_fill(~is_active, -1), logprobs.double().view(torch.long)])
        self._results[:, :, :slots].index_copy_(1, step, result.unsqueeze(1))
        ids.copy_(torch.where(is_active, chosen, ids))
        position.add_(active)
        active.mul_(~self._stops[chosen])
        step.add_(1)

    # -- prefill of observations --------------------------------------------------------------------------------

    def prefill_observations(self, sessions: Sequence[Session]) -> None:
        short = [session for session in sessions if 0 < session.uncached <= WIDTHS[-1]]
        if short:
            longest = max(session.uncached for session in short)
            new = next(width for width in WIDTHS if width >= longest)
            padded = self._slots(len(short)) * new
            real = sum(session.uncached for session in short)
            if padded <= min(MOST_PADDED, max(3 * real, CHEAP_PADDED)):
                self._prefill_short(short, new)
        self.prefill([session for session in sessions if session.uncached])

    def _prefill_short(self, sessions: Sequence[Session], new: int) -> None:
        slots = self._slots(len(sessions))
        state = torch.zeros(_IDS + new, self._most, dtype=torch.long)
        state[_ROW] = self.pool.rows - 1  # unused slots: the scrap row
        used = len(sessions)
        state[_ROW, :used] = torch.tensor([session.row for session in sessions])
        state[_START, :used] = torch.tensor([session.cached for session in sessions])
        state[_COUNT, :used] = torch.tensor([session.uncached for session in sessions])
        length = self._length(max(len(session.tokens) - 1 for session in sessions))
        padded = [(session.tokens[session.cached : -1] + [0] * new)[:new] for session in sessions]
        state[_IDS:, :used] = torch.tensor(padded).T
        self._send(self._new, state)
        self._run("prefill", slots, new, length)
        for session in sessions:
            session.cached = len(session.tokens) - 1

    def _prefill_step(self, slots: int, new: int, length: int) -> None:
        """Compute the keys and values of new tokens."""
        state = self._new[:, :slots]
        plan = StaticPlan(self.pool, state[_ROW], state[_START], state[_COUNT], new, length, self._attention)
        ids = state[_IDS : _IDS + new].T.reshape(-1)
        self.forward(ids, plan, torch.empty(0, dtype=torch.long, device=self.device))


def make_steps(kind: Kind, forward: Forward, device: torch.device, *, vocabulary: int, most: int) -> Steps:
    """The steps of a decoder. Static ones are captured as CUDA graphs on a GPU, and run directly on a CPU.

    Args:
        vocabulary: number of logits.
        most: the most sessions.
    """
    gpu = device.type == "cuda"
    if kind == "plain" or (kind == "auto" and not gpu):
        return PlainSteps(forward, device)
    return StaticSteps(
        forward,
        device,
        vocabulary=vocabulary,
        most=most,
        attention="fused" if gpu else "products",
        graphs=GraphedSteps(partial(CudaCapture, device)) if gpu else None,
        kept_bytes=int(KEPT_SHARE * torch.cuda.mem_get_info(device)[1]) if gpu else 0,
    )
