"""What an iteration asks of the server, in tokens and in money."""

from __future__ import annotations

from collections.abc import Mapping

from skillsd.engines.estimate import Workload
from skillsd.engines.spec import EngineSpec
from skillsd.engines.tinker.settings import Prices, TinkerSettings

KINDS: Mapping[str, str] = {
    "prefill": "prefilled",
    "cached": "prefilled before (in the prefix cache)",
    "sample": "sampled",
    "score": "scored",
    "train": "trained",
}
"""Kind of token -> in words."""


def tokens(workload: Workload, context_tokens: int, *, taught: bool, general: bool) -> dict[str, int]:
    """Tokens of an iteration by kind, if every episode uses all of its turns and its whole token budget.

    Each turn's prompt is everything before it. What the last turn's prompt did not hold is prefilled; the rest is in
    the server's prefix cache, at best.

    Args:
        context_tokens: that a skill adds to the teacher's sequence.
        general: every gradient takes a scoring pass; otherwise the first minibatch's does not.
    """
    sampled = min(workload.turns * workload.turn_tokens, workload.trajectory_tokens - 1)
    prompts = workload.turns * workload.trajectory_tokens // 2  # they grow evenly
    fresh = min(workload.trajectory_tokens - sampled, prompts)
    whole = workload.episodes * workload.trajectory_tokens
    trained = workload.epochs * whole
    known = 0 if general else whole // workload.minibatches
    scored = trained - known + (whole + workload.episodes * context_tokens if taught else 0)
    return {
        "prefill": workload.episodes * fresh,
        "cached": workload.episodes * (prompts - fresh),
        "sample": workload.episodes * sampled,
        "score": scored,
        "train": trained,
    }


def cost(found: Mapping[str, int], prices: Prices) -> float | None:
    """In the prices' currency; None unless there are prices of prefilling, sampling and training."""
    if prices.prefill is None or prices.sample is None or prices.train is None:
        return None
    each = {
        "prefill": prices.prefill,
        "cached": prices.prefill if prices.cached is None else prices.cached,
        "sample": prices.sample,
        "score": prices.train if prices.score is None else prices.score,
        "train": prices.train,
    }
    return sum(count * each[kind] for kind, count in found.items()) / 1e6


def lines(options: TinkerSettings, spec: EngineSpec, workload: Workload, iterations: int) -> list[str]:
    """For `skillsd doctor`."""
    general = options.route == "general"
    found = tokens(workload, spec.context_tokens, taught=spec.teacher != "none", general=general)
    text = [f"{KINDS[kind]:40} {count:14,} tokens" for kind, count in found.items()]
    each = cost(found, options.prices)
    if each is None:
        text.append("for the cost, give engine.prices.prefill, .sample and .train per million tokens (.cached, .score)")
    else:
        text.append(f"{'cost of an iteration':40} {each:14,.2f} in the currency of engine.prices")
        text.append(f"{f'of {iterations} iterations':40} {iterations * each:14,.2f}, without evaluations")
    return text
