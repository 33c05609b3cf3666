"""The learner and sampler of a Tinker server: LoRA training there, losses and their autograd here."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillsd.engines.base import (
    Learner,
    Loss,
    Sample,
    Sampler,
    SampleRequest,
    StaleTeacherError,
    StepReport,
    TokenSequence,
    TrainItem,
    Weights,
    WeightsHandle,
    check_request,
    not_finite,
)
from skillsd.engines.spec import EngineSpec
from skillsd.engines.tinker import adapters, data, model, state
from skillsd.engines.tinker.gradient import Share, evaluate, gradient, sampled_by_student
from skillsd.engines.tinker.service import RESUME, Connect, Service
from skillsd.engines.tinker.settings import TinkerSettings
from skillsd.engines.torch.models import resolve
from skillsd.errors import EngineFailedError, UserError
from skillsd.metrics import Metrics
from skillsd.objective.logprobs import CHOSEN, TokenLogprobs, Want

MOST_APART = 1.0
"""Nats. If the sampler's and the trainer's log-probs of the same tokens and weights differ by more on average, they are
not of the same weights; in bfloat16 the mean is a few hundredths."""


class TinkerEngine(Learner, Sampler):
    """A student at a server: it samples, scores and trains there.

    The adapter is created with the first request that needs it. Until the first update the student is the base model,
    so sampling it, or a teacher frozen at it, needs no adapter. The gradient of a step is sent with the step, or, for
    the first minibatch after sampling, at once (`skillsd.engines.tinker.gradient`): until then a loss that is not
    finite can be forgotten.

    Args:
        connect: makes the SDK's clients (tests use others).

    Raises:
        UserError: if the key, the SDK, or the model's tokenizer or weights are missing.
        EngineFailedError: if the server does not answer.
    """

    def __init__(self, options: TinkerSettings, spec: EngineSpec, connect: Connect | None = None) -> None:
        self._options, self._spec = options, spec
        self.tokenizer, self.stop_tokens, self.max_length = model.read(spec.model)
        self._base = options.base_model or resolve(spec.model)
        self._service = Service(options, connect)
        try:
            self._check_base()
        except BaseException:
            self._service.close()
            raise
        self.version = 0
        self._trainer: Any = None  # the SDK's client of the adapter, once there is one
        self._published: tuple[int, Any] | None = None  # (version, sampling client) of the last `publish`
        self._sampling: tuple[int, Any] | None = None  # of the last `load`
        self._held: dict[str, tuple[int, ...]] = {}  # each session's tokens
        self._prompt_tokens = self._cached_tokens = 0  # since the last call of `metrics`
        self._pending: list[Share] = []  # of the next step's gradient, to be sent with it
        self._sent = False  # whether a part of the next step's gradient is at the server
        self._finite = True  # everything accumulated since the last step
        self._teacher_follows = spec.teacher != "snapshot"
        self._teacher_path: str | None = None  # of the snapshot's saved weights; None is the base model
        self._teacher: Any = None  # the snapshot's sampling client, once it is used
        self._student_moved = False  # since the last sync

    def _check_base(self) -> None:
        known = self._service.models()
        if self._base not in known:
            raise UserError(
                f"{self._service.address} has no model {self._base!r} (engine.base_model, by default model.name); it "
                f"has: {', '.join(sorted(known)) or 'none'}"
            )
        self.max_length = min(self.max_length, known[self._base] or self.max_length)

    async def _training(self) -> Any:
        """The SDK's training client."""
        if self._trainer is None:
            rank = self._spec.lora.rank if self._spec.lora else 0
            create = self._service.client.create_lora_training_client
            arguments = {"rank": rank, "seed": self._spec.seed % (1 << 31), "train_unembed": False}
            self._trainer = await self._service.call("a new adapter", lambda: create(self._base, **arguments))
        return self._trainer

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        if request.weights != "student":
            raise ValueError("the engine 'tinker' samples from the student only")
        check_request(request, self.max_length, self._held.get(request.session or "", ()))
        if self._sampling is None:
            raise EngineFailedError("the sampler has no weights yet: call Engine.publish() first")
        version, client = self._sampling
        stops = sorted(self.stop_tokens)
        parameters = data.sampling(request.temperature, request.max_tokens, request.seed, stops)
        answer = await self._service.call(
            "a sample", lambda: client.sample(data.prompt(request.tokens), 1, parameters), repeatable=True
        )
        found = answer.sequences[0]
        tokens, stopped = tuple(found.tokens), found.stop_reason == "stop"
        if stopped and tokens[-1:] and tokens[-1] not in self.stop_tokens:
            raise EngineFailedError(
                f"{self._service.address} ended a sample without its stop token (its last token is {tokens[-1]}, the "
                f"stop tokens {stops}): trajectories without the ends of turns can't be trained on"
            )
        self._prompt_tokens += len(request.tokens)
        self._cached_tokens += getattr(answer, "prompt_cache_hit_tokens", 0) or 0
        if request.session is not None:
            self._held[request.session] = (*request.tokens, *tokens)
        return Sample(tokens, tuple(found.logprobs or ()), "stop" if stopped else "length", version)

    def end_session(self, session: str) -> None:
        self._held.pop(session, None)

    async def load(self, weights: WeightsHandle) -> None:
        if weights.location is not None or self._published is None or weights.version != self._published[0]:
            raise ValueError(f"the engine 'tinker' loads the weights that it published last, not {weights}")
        self._sampling = self._published
        self._held.clear()

    def metrics(self) -> dict[str, float]:
        share = self._cached_tokens / self._prompt_tokens if self._prompt_tokens else None
        self._prompt_tokens = self._cached_tokens = 0
        return {} if share is None else {"rollout/cached_prompt_tokens": share}

    # -- scoring ------------------------------------------------------------------------------------------------

    async def logprobs(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        want: Want = CHOSEN,
    ) -> list[TokenLogprobs]:
        self._check(sequences, temperature, want)
        if weights == "teacher" and self._teacher_follows and self._student_moved:
            raise StaleTeacherError(
                "the teacher follows the student, which was updated since the last sync_teacher(): sync first"
            )
        own = weights == "teacher" and not self._teacher_follows
        found = await (self._score_snapshot(sequences) if own else self._score(sequences))
        if any(bool(torch.isnan(one).any()) for one in found):
            raise not_finite(f"{weights}'s log-probs", self.version)
        return [TokenLogprobs(one) for one in found]

    async def _score(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """The student's log-probs, ``[marked]`` each, by the weights in training."""
        marked = [sequence for sequence in sequences if sequence.marked]
        if not marked:
            return [torch.empty(0) for _ in sequences]
        trainer = await self._training()
        batch = [data.to_score(sequence) for sequence in marked]
        answer = await self._service.call("log-probs", lambda: trainer.forward(batch, "cross_entropy"), repeatable=True)
        found = iter(data.logprobs(answer, marked))
        return [next(found) if sequence.marked else torch.empty(0) for sequence in sequences]

    async def _score_snapshot(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """The teacher's, by its saved weights."""
        if self._teacher is None:
            self._teacher = await self._sampler_of(self._teacher_path)
        return list(await asyncio.gather(*(self._score_one(self._teacher, sequence) for sequence in sequences)))

    async def _score_one(self, client: Any, sequence: TokenSequence) -> Tensor:
        if not sequence.marked:
            return torch.empty(0)
        answer = await self._service.call(
            "the teacher's log-probs", lambda: client.compute_logprobs(data.prompt(sequence.tokens)), repeatable=True
        )
        return torch.tensor([p for p, marked in zip(answer, sequence.mask, strict=True) if marked])

    async def _sampler_of(self, path: str | None) -> Any:
        """A sampling client of saved weights; None: of the base model."""
        create = self._service.client.create_sampling_client
        which = {"base_model": self._base} if path is None else {"model_path": path}
        return await self._service.call(f"a sampler of {path or self._base}", lambda: create(**which))

    def _check(self, sequences: Sequence[TokenSequence], temperature: float, want: Want = CHOSEN) -> None:
        if temperature != 1 or want != CHOSEN:
            raise ValueError("the engine 'tinker' has log-probs of the given tokens, at temperature 1, and no others")
        longest = max((len(s.tokens) for s in sequences), default=0)
        if longest > self.max_length:
            raise ValueError(f"a sequence has {longest} tokens, but the model takes at most {self.max_length}")

    # -- training -----------------------------------------------------------------------------------------------

    async def forward_backward(self, batch: Sequence[TrainItem], loss: Loss, *, temperature: float = 1.0) -> Metrics:
        sequences = [item.sequence for item in batch]
        self._check(sequences, temperature)
        known = self._known(batch, loss)
        found = gradient(batch, loss, await self._score(sequences) if known is None else known)
        if self._sent and not (found.finite and self._options.traits.sums):
            raise EngineFailedError(
                "a part of this step's gradient is at the server, where it can't be changed any more, and the next "
                f"part {'does not add up with it there' if found.finite else 'is not finite'}. {RESUME}"
            )
        self._finite &= found.finite
        if known is None:
            # A sequence without gradient costs a pass for nothing; but a step without any gradient is still a step of
            # Adam, whose moments move the weights.
            self._pending += [share for share in found.shares if bool(share.advantages.any())] or found.shares[:1]
            return found.metrics
        if not found.finite:
            return found.metrics
        shares = [share for share in found.shares if share.sequence.marked]
        current = torch.cat(await self._send(shares))
        self._check_agreement(torch.cat([share.logprobs for share in shares]), current)
        return evaluate(batch, loss, current)[1]

    def _known(self, batch: Sequence[TrainItem], loss: Loss) -> list[Tensor] | None:
        """The student's log-probs without a pass for them; None if that needs one, or the loss may be forgotten."""
        if self._options.route == "general" or self._pending or self._sent or not self._finite:
            return None
        return sampled_by_student(batch, loss)

    async def _send(self, shares: Sequence[Share]) -> list[Tensor]:
        """Add the shares to the gradient at the server; returns today's log-probs of their tokens."""
        trainer = await self._training()
        batch = data.to_train(shares, sums=self._options.traits.sums)
        answer = await self._service.call("a gradient", lambda: trainer.forward_backward(batch, "importance_sampling"))
        self._sent = True
        found = data.logprobs(answer, [share.sequence for share in shares])
        if not all(bool(torch.isfinite(one).all()) for one in found):
            raise not_finite("student's log-probs", self.version)
        return found

    def _check_agreement(self, sampled: Tensor, scored: Tensor) -> None:
        apart = (sampled - scored).abs().mean().item()
        if apart > MOST_APART:
            raise EngineFailedError(
                f"the log-probs that {self._service.address} reported for sampled tokens and those of the weights in "
                f"training (version {self.version}) differ by {apart:.2f} nats on average, so it does not sample from "
                f"those weights. {RESUME}"
            )

    async def step(self, learning_rate: float) -> StepReport:
        finite, pending = self._finite, self._pending
        self._finite, self._pending = True, []
        if not finite or not (pending or self._sent):
            return StepReport(applied=finite, grad_norm=0.0 if finite else math.nan, version=self.version)
        if pending:
            await self._send(pending)
        trainer, spec = await self._training(), self._spec
        parameters = data.adam(learning_rate, spec.betas, spec.weight_decay, spec.max_grad_norm)
        answer = await self._service.call("an optimiser step", lambda: trainer.optim_step(parameters))
        self._sent = False
        self._student_moved = True
        self.version += 1
        norm = next((float(v) for name, v in (answer.metrics or {}).items() if "grad_norm" in name), None)
        if norm is not None and not math.isfinite(norm):
            raise EngineFailedError(
                f"the gradient at {self._service.address} was not finite (norm {norm}) although the loss was, so the "
                f"weights there are lost. {RESUME}, with a lower training.learning_rate"
            )
        return StepReport(applied=True, grad_norm=norm, version=self.version)

    # -- the teacher --------------------------------------------------------------------------------------------

    async def sync_teacher(self, rate: float = 1.0) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"the rate of a teacher sync is {rate}; it must be above 0 and at most 1")
        if rate != 1:
            raise ValueError(f"the engine 'tinker' can't average weights (rate {rate}): sync with rate 1")
        if not self._teacher_follows and self._student_moved:
            trainer, name = await self._training(), self._name()
            saved = await self._service.call("saved weights", lambda: trainer.save_weights_for_sampler(name))
            self._teacher_path, self._teacher = saved.path, None
        self._student_moved = False

    def _name(self) -> str:
        """A new name at the server for the weights as they are."""
        return f"v{self.version}-{secrets.token_hex(4)}"

    # -- weights out and in -------------------------------------------------------------------------------------

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        if folder is not None:
            raise UserError("the engine 'tinker' can't publish its weights into a folder: they are at the server")
        if self._published is None or self._published[0] != self.version:
            self._published = (self.version, await self._current_sampler())
        return WeightsHandle(self.version)

    async def _current_sampler(self) -> Any:
        if not self.version:
            return await self._sampler_of(None)
        trainer = await self._training()
        return await self._service.call(
            "a sampler of the new weights", lambda: trainer.save_weights_and_get_sampling_client()
        )

    async def export(self, folder: Path, *, merge: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trainer = await self._training()
        if merge:
            await adapters.write_merged(self._service, trainer, self._name(), folder, self._spec)
        else:
            await adapters.download(self._service, trainer, self._name(), folder)
        self.tokenizer.save_pretrained(folder)

    async def save_state(self, folder: Path) -> None:
        """Saves the state at the server, and its name here; the weights are fetched by `export`."""
        trainer, name = await self._training(), self._name()
        days = self._options.keep_days
        seconds = None if days is None else round(days * 86400)
        saved = await self._service.call("a saved state", lambda: trainer.save_state(name, ttl_seconds=seconds))
        state.write(folder, state.State(saved.path, self._base, self.version, self._student_moved, self._teacher_path))

    async def load_state(self, folder: Path) -> None:
        found = state.read(folder, self._base)
        create = self._service.client.create_training_client_from_state_with_optimizer
        self._trainer = await self._service.call(f"the state {found.path}", lambda: create(found.path))
        self.version, self._student_moved = found.version, found.student_moved
        self._teacher_path, self._teacher = found.teacher, None
        self._published = None
        self._pending, self._sent, self._finite = [], False, True

    def close(self) -> None:
        self._service.close()
