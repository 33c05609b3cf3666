"""Log-probs reported by the sampler compared with those of the learner, engine by engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from parts import DTYPES, ENGINES, VLLM, own_command, part
from torch import Tensor

from skillsd.engines.base import Engine, TokenSequence
from skillsd.report import manifest
from skillsd.types import Trajectory

if TYPE_CHECKING:
    from skillsd.engines.torch.engine import TorchEngine

EPISODES, TURNS, TURN_TOKENS = 16, 4, 16
"""Per measurement: 16 sequences of 4 x 16 sampled tokens, with observations between them."""
MAX_LENGTH = 1024
CHANGE = 0.1
"""Each weight is multiplied by 1 + 0.1 z, z standard normal: large enough for a stale layer to show."""


def gap(folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    for engine in ENGINES:
        if engine == "vllm" and not VLLM.is_file():
            print(f"gap-vllm: skipped, no vLLM in {VLLM.parents[1]}: run make vllm-env", flush=True)
            continue
        for dtype in DTYPES:
            part(
                folder,
                f"gap-{engine}-{dtype}",
                lambda engine=engine, dtype=dtype: asyncio.run(_gap(engine, model, dtype)),
            )


async def _gap(name: str, model: str, dtype: str) -> dict[str, Any]:
    """The sampler's log-probs minus the learner's, before and after every weight has changed."""
    from skillsd.engines.torch.engine import TorchEngine
    from skillsd.engines.torch.options import TorchOptions

    learner = TorchEngine(model, dtype=dtype, device="cpu", micro_batch_tokens=2048)
    figures: dict[str, Any] = {"command": own_command(), "engine": name, "dtype": dtype, "model": manifest.model(model)}
    engine = Engine(learner, learner, name, TorchOptions().provides())
    if name == "vllm":
        begin = time.perf_counter()
        engine = await _with_vllm(learner)
        sampler: Any = engine.sampler
        figures |= {"version": sampler.vllm_version, "start_seconds": time.perf_counter() - begin}
    try:
        figures["tied_embeddings"] = bool(learner.model.config.tie_word_embeddings)  # type: ignore[union-attr]
        _, figures["before"], _ = await _sampled_and_scored(engine)
        old = {key: weight.detach().clone() for key, weight in learner.model.named_parameters()}
        _disturb(learner)
        episodes, figures["after"], reload_seconds = await _sampled_and_scored(engine, publish=True)
        # The gap on these tokens if the sampler had kept the old weights: all of them, or only the output head's.
        sequences = _sequences(episodes)
        new = await _score(learner, sequences)
        figures["stale"] = {
            "output head": _spread(new - await _score_with_old_head(learner, old, sequences)),
            "all weights": _spread(new - await _score_with_old_weights(learner, old, sequences)),
        }
        if name == "vllm":
            figures["reload_seconds"] = reload_seconds
    finally:
        engine.close()
    return figures


async def _with_vllm(learner: TorchEngine) -> Engine:
    """vLLM as the learner's sampler, started with its weights."""
    from skillsd.engines.vllm.options import VllmOptions
    from skillsd.engines.vllm.sampler import VllmSampler

    options = VllmOptions(python=str(VLLM), max_model_len=MAX_LENGTH)
    engine = Engine(
        learner, VllmSampler(learner, options, max_length=MAX_LENGTH, at_once=256), "vllm", options.provides()
    )
    try:
        await engine.publish()
    except BaseException:
        engine.close()
        raise
    return engine


async def _sampled_and_scored(
    engine: Engine, *, publish: bool = False
) -> tuple[list[Trajectory], dict[str, Any], float]:
    """Play episodes of Sokoban, all at once, each a session that its turns extend.

    Args:
        publish: hand the learner's weights to the sampler first.

    Returns:
        The episodes, their gap, and the seconds of publishing, which are part of ``sampling_seconds``.
    """
    from skillsd.envs.base import evenly_spaced
    from skillsd.envs.sokoban import Sokoban
    from skillsd.prompting.renderer import ChatRenderer
    from skillsd.rollouts.collect import collect
    from skillsd.rollouts.engine_policy import EnginePolicy
    from skillsd.rollouts.policy import Budget

    task_set = Sokoban(preset="nano")
    policy = EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens))
    budget = Budget(turns=TURNS, turn_tokens=TURN_TOKENS, trajectory_tokens=MAX_LENGTH)
    tasks = evenly_spaced(task_set.tasks("train"), EPISODES)
    begin = time.perf_counter()
    if publish:
        await engine.publish()
    published = time.perf_counter()
    collected = await collect(policy, task_set, tasks, budget, group_size=1, seed=0)
    seconds = time.perf_counter() - begin
    episodes = [trajectory for group in collected.groups for trajectory in group.trajectories]
    reported = torch.tensor(
        [x for e in episodes for x, sampled in zip(e.logprobs, e.action_mask, strict=True) if sampled],
        dtype=torch.float32,
    )
    scored = await _score(engine.learner, _sequences(episodes))
    figures = {
        "episodes": len(episodes),
        "turns": sum(len(e.turns) for e in episodes),
        "tokens_read": sum(len(e.tokens) for e in episodes),
        "sampling_seconds": seconds,
        "mean_logprob": float(scored.mean()),
        **_spread(scored - reported),
    }
    return episodes, figures, published - begin


def _sequences(episodes: Sequence[Trajectory]) -> list[TokenSequence]:
    return [TokenSequence(episode.tokens, episode.action_mask) for episode in episodes]


async def _score(learner: Any, sequences: Sequence[TokenSequence]) -> Tensor:
    """The learner's log-probs of all sampled tokens, ``[tokens]``."""
    return torch.cat([scored.chosen for scored in await learner.logprobs(sequences)])


def _spread(differences: Tensor) -> dict[str, float]:
    ordered = differences.abs().sort().values
    last = len(ordered) - 1
    return {
        "tokens": len(ordered),
        "mean": float(ordered.mean()),
        "p50": float(ordered[round(0.5 * last)]),
        "p99": float(ordered[round(0.99 * last)]),
        "max": float(ordered[last]),
        "signed_mean": float(differences.mean()),
    }


def _disturb(learner: TorchEngine) -> None:
    """Change every weight, as an update would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in learner.model.parameters():
            weight.mul_(1 + CHANGE * torch.randn(weight.shape, generator=generator))
    # As in `TorchEngine.step`.
    learner.forget_caches()
    learner.version += 1


async def _score_with_old_head(
    learner: TorchEngine, old: dict[str, Tensor], sequences: Sequence[TokenSequence]
) -> Tensor:
    """Scores with the current weights but the old output head (the old embeddings, as they are tied)."""
    model: Any = learner.model
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(key for key, weight in model.named_parameters() if weight is embeddings.weight)
    current = head.weight
    head.weight = torch.nn.Parameter(old[name], requires_grad=False)
    try:
        return await _score(learner, sequences)
    finally:
        head.weight = current


async def _score_with_old_weights(
    learner: TorchEngine, old: dict[str, Tensor], sequences: Sequence[TokenSequence]
) -> Tensor:
    with torch.no_grad():
        for key, weight in learner.model.named_parameters():
            weight.copy_(old[key])
    return await _score(learner, sequences)
