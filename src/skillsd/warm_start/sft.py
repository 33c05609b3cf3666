"""Warm start: supervised training on an environment's demonstrations, with and without a skill in the prompt.

The goal is a policy that (1) plays weakly under the plain prompt and (2) much better with a good skill in its prompt.
Without (2) a skill-conditioned teacher has nothing to teach.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skillsd.config import SftConfig
from skillsd.engines.base import TokenSequence, TrainItem
from skillsd.engines.torch.engine import TorchEngine
from skillsd.envs.base import TaskSet
from skillsd.envs.checked import checked
from skillsd.errors import UserError
from skillsd.files.write import writing
from skillsd.metrics import Mean, Metrics
from skillsd.objective import TokenLogprobs
from skillsd.prompting.renderer import ChatRenderer
from skillsd.prompting.templates import Place, load_template, render_skill, with_context
from skillsd.seeds import derive_seed
from skillsd.types import TRAIN_SPLIT, Demonstration
from skillsd.warm_start.new_model import make_model

VOCABULARY_SAMPLE = 4000
"""Number of demonstrations that a new tokenizer is trained on."""


FINGERPRINT_SAMPLE = 1000
"""Number of demonstrations in `demonstrations_fingerprint`."""


@dataclass(frozen=True)
class SftProgress:
    """Progress of the warm start: after `step` steps, the batch's mean loss per action token (nats)."""

    step: int
    steps: int
    loss: float


def context_of(demonstration: Demonstration, template: str) -> str:
    """The demonstration's skill as it is added to its prompt; empty without one."""
    return "" if demonstration.skill is None else render_skill(demonstration.skill, template)


def make_item(
    demonstration: Demonstration, renderer: ChatRenderer, template: str, observation_weight: float
) -> TrainItem:
    """A demonstration as one sequence. The signal ``weight`` is 1 for action tokens and `observation_weight` for the
    environment's; the prompt and noisy actions have weight 0 and are masked out."""
    tokens = list(renderer.prompt(demonstration.prompt, context_of(demonstration, template)))
    weights = [0.0] * len(tokens)
    for number, turn in enumerate(demonstration.turns):
        reply = renderer.reply(turn.action)
        tokens += reply
        weights += [1.0 if turn.learn else 0.0] * len(reply)
        if number < len(demonstration.turns) - 1:  # the last observation is not followed by an action
            answer = renderer.observation(turn.observation, reply[-1])
            tokens += answer
            weights += [observation_weight] * len(answer)
    mask = tuple(weight > 0 for weight in weights)
    return TrainItem(TokenSequence(tuple(tokens), mask), {"weight": torch.tensor([w for w in weights if w > 0])})


@dataclass(frozen=True)
class WeightedNll:
    """Weighted negative log-likelihood: the sum over tokens, divided by `normaliser`, the weight of the whole batch."""

    normaliser: float

    def __call__(self, student: TokenLogprobs, signals: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        weight = signals["weight"]
        nll = -student.chosen
        action = weight == 1.0
        logged = Mean(float(nll.detach()[action].sum()), float(action.sum()))
        return (weight * nll).sum() / self.normaliser, {"loss": logged}


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


async def train(
    config: SftConfig, task_set: TaskSet, folder: Path, on_step: Callable[[SftProgress], None]
) -> TorchEngine:
    """Run the warm start and write the model into `folder`.

    Raises:
        UserError: if the environment has no demonstrations, or a gradient is not finite.
    """
    options = config.warm_start
    if task_set.tools:
        raise UserError(
            f"the environment {task_set.name!r} has tools, and demonstrations that call tools are not supported: "
            "train a model that calls tools already"
        )
    if config.model.lora:
        raise UserError("model.lora is set, but the warm start trains all weights: leave it out")
    template = load_template(options.template)
    model = config.model.name
    texts: list[str] = []
    if config.new is not None:
        sample = itertools.islice(_demonstrations(config, task_set, "vocabulary"), VOCABULARY_SAMPLE)
        texts, replies = _words(sample, template, options.place)
        make_model(folder, config.new, texts, replies, derive_seed(config.seed, "weights") % 2**32)
        model = str(folder)
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    engine = TorchEngine(
        model,
        dtype=config.model.dtype,
        device=config.model.device,
        micro_batch_tokens=options.micro_batch_tokens,
        betas=(0.9, options.beta2),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    renderer = ChatRenderer(
        engine.tokenizer, engine.stop_tokens, config.model.chat_template_kwargs, place=options.place
    )
    copying = config.new.copying_steps if config.new else 0
    total = copying + options.steps

    async def learn(step: int, batch: Sequence[TrainItem], rate: float) -> None:
        weight = sum(float(item.signals["weight"].sum()) for item in batch)
        metrics = await engine.forward_backward(batch, WeightedNll(weight))
        if not (await engine.step(rate)).applied:
            raise UserError(f"the gradient of step {step} is not finite: lower warm_start.learning_rate")
        loss = metrics["loss"]
        assert isinstance(loss, Mean)
        on_step(SftProgress(step + 1, total, loss.value))

    repeats = _repeats(config, texts, engine) if copying else iter(())
    for step in range(copying):
        rate = options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))
        await learn(step, list(itertools.islice(repeats, options.batch)), rate)
    stream = _demonstrations(config, task_set, "demonstrations")
    for step in range(options.steps):
        batch = [
            make_item(demonstration, renderer, template, options.observation_weight)
            for demonstration in itertools.islice(stream, options.batch)
        ]
        rate = learning_rate(step, options.learning_rate, options.warmup_steps, options.steps)
        await learn(copying + step, batch, rate)
    with writing(folder, by_library=True):
        engine.save_weights(folder)
    return engine


def demonstrations_fingerprint(config: SftConfig, task_set: TaskSet) -> str:
    """Hash of the first demonstrations as the model reads them (16 hex digits). With another one, another model would
    be trained: the levels, the scripted players, the wording, the template or the skill's place have changed."""
    template = load_template(config.warm_start.template)
    digest = hashlib.sha256()
    for demonstration in itertools.islice(_demonstrations(config, task_set, "demonstrations"), FINGERPRINT_SAMPLE):
        messages = with_context(demonstration.prompt, context_of(demonstration, template), config.warm_start.place)
        prompt = [[message.role, message.content] for message in messages]
        turns = [[turn.action, turn.observation, turn.learn] for turn in demonstration.turns]
        digest.update(json.dumps([prompt, turns]).encode())
    return digest.hexdigest()[:16]


REPEATED_WORDS = 16
"""Maximum number of words that come twice in a sequence of `_repeats`."""


def _repeats(config: SftConfig, texts: Sequence[str], engine: TorchEngine) -> Iterator[TrainItem]:
    """Sequences of different random words of the demonstrations, each twice in the same order. The second half is to be
    predicted."""
    words = sorted({token for text in texts for token in engine.tokenizer.encode(text, add_special_tokens=False)})
    random_ = random.Random(derive_seed(config.seed, "repeats"))
    longest = min(REPEATED_WORDS, len(words), engine.max_length // 2)
    while True:
        half = random_.sample(words, random_.randint(min(4, longest), longest))
        mask = (*[False] * len(half), *[True] * len(half))
        yield TrainItem(TokenSequence((*half, *half), mask), {"weight": torch.ones(len(half))})


def _demonstrations(config: SftConfig, task_set: TaskSet, purpose: str) -> Iterator[Demonstration]:
    seed = derive_seed(config.seed, purpose)
    return checked(task_set).demonstrations(TRAIN_SPLIT, seed=seed, **config.warm_start.demonstrations)


def _words(demonstrations: Iterator[Demonstration], template: str, place: Place) -> tuple[list[str], list[str]]:
    """All texts, spaced as by the chat template, and all distinct replies."""
    texts: list[str] = []
    replies: dict[str, None] = {}
    for demonstration in demonstrations:
        prompt = with_context(demonstration.prompt, context_of(demonstration, template), place)
        texts += [f" {message.content}" for message in prompt]
        for turn in demonstration.turns:
            texts += [f" {turn.action}", f" {turn.observation}"]
            replies[turn.action] = None
    return texts, sorted(replies)
