"""A log of Inspect (inspect_ai), for ``inspect view``: a sample per episode."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    write_eval_log,
)
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ModelOutput
from inspect_ai.scorer import Score

from skillsd import __version__
from skillsd.files.write import replacing
from skillsd.runs.exports import NamedEpisode, clean
from skillsd.runs.opened import OpenRun

_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def write(run: OpenRun, episodes: Sequence[NamedEpisode], out: Path) -> str:
    config = run.config
    spec = EvalSpec(
        created=datetime.now(UTC).isoformat(),
        task=config.environment.name,
        run_id=run.folder.name,
        dataset=EvalDataset(name=config.environment.name, samples=len(episodes)),
        model=config.model.name,
        config=EvalConfig(),
        packages={"skillsd": __version__},
        metadata={"method": config.method, "seed": config.seed, "folder": str(run.folder)},
    )
    samples = [_sample(episode, config.model.name) for episode in episodes]
    scores = [_score(name, [float(episode.facts[name]) for episode in episodes]) for name in ("reward", "success")]
    results = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=scores)
    with replacing(out, by_library=True) as aside:
        write_eval_log(EvalLog(status="success", eval=spec, results=results, samples=samples), aside, format="eval")
    return f"inspect view --log-dir {out.parent}"


def _sample(episode: NamedEpisode, model: str) -> EvalSample:
    t, facts = episode.episode.trajectory, episode.facts
    messages: list[ChatMessage] = [_MESSAGES[m["role"]](content=m["content"]) for m in episode.messages]
    for number, columns in enumerate(episode.turns):
        messages[len(t.prompt) + 2 * number].metadata = columns
    last = clean(t.turns[-1].action) if t.turns else ""
    return EvalSample(
        id=f"{facts['iteration']}.{episode.place}/{facts['task']}",
        epoch=episode.member + 1,
        input=messages[: len(t.prompt)],
        target="",
        messages=messages,
        output=ModelOutput.from_content(model, last),
        scores={name: Score(value=float(facts[name]), answer=last) for name in ("reward", "success")},
        metadata=facts,
    )


def _score(name: str, values: Sequence[float]) -> Any:
    mean = EvalMetric(name="mean", value=sum(values) / max(1, len(values)))
    return EvalScore(name=name, scorer=name, metrics={"mean": mean})
