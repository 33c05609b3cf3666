"""The embedded engine: a learner and a sampler over a causal LM of `transformers`, in this process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

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
    wanted_by,
)
from skillsd.engines.options import LoraOptions
from skillsd.engines.top_k import check_candidates, check_k, nothing
from skillsd.engines.torch import export, state
from skillsd.engines.torch.attention import Plan
from skillsd.engines.torch.budget import Budget, budget_of
from skillsd.engines.torch.decode import DecodeLoop, Decoder
from skillsd.engines.torch.forward import Network, enable_recomputation, recomputed_activations, with_weights
from skillsd.engines.torch.lm_head import TrunkAndHead
from skillsd.engines.torch.memory import Phase, explained
from skillsd.engines.torch.micro_batches import MicroBatches
from skillsd.engines.torch.models import (
    load_model,
    load_teacher,
    longest_sequence,
    pick_device,
    resolve,
    stop_tokens,
    vocabulary,
)
from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.static_steps import Kind, make_steps
from skillsd.engines.torch.teacher_copy import STALE, check_rate, move_towards
from skillsd.engines.torch.verify import verify_model
from skillsd.errors import UserError
from skillsd.metrics import Metrics, add_metrics
from skillsd.objective.logprobs import CHOSEN, WHOLE, TokenLogprobs, Want

T = TypeVar("T")


class TorchEngine(Learner, Sampler):
    """A causal LM in this process, on one device: samples, scores and trains.

    Args:
        model: a shipped model's name, a local folder or a hub name.
        dtype: ``float32``, or ``bfloat16`` with float32 master weights in the optimiser.
        device: ``auto``, ``cpu``, ``cuda`` ...
        lora: train adapters instead of all weights.
        teacher_follows: the teacher shares the student's weights, and can be used until the first update after a
            `sync_teacher`. Takes no memory; right if every iteration begins with a sync. If False, the teacher is a
            snapshot of the trainable weights, in their dtype. A moving average (`sync_teacher` with a rate below 1) of
            bfloat16 weights is also kept in float32: rounded at every sync, it would never move.
        teacher_model: the teacher is this other model, given like `model` (for example the folder ``model`` of a
            checkpoint), with the student's tokenizer and without adapters. It is never synchronised, never stale and
            not saved in checkpoints; `teacher_follows` is ignored. Sequences are limited to what both models take.
        micro_batch_tokens: the most tokens in one forward pass (a longer sequence goes alone); halved if out of memory.
            ``auto``: by a GPU's free memory, when the first sequences come; 8192 on a CPU.
        max_sessions: the most episodes whose keys and values are kept at once.
        in_thread: score and train in a thread, so that the event loop, which decodes, stays free.
        decode: ``static`` steps run on the device without waiting for the host, captured as CUDA graphs on a GPU;
            ``plain`` steps are built by the host one by one; ``auto`` is static on a GPU and plain on a CPU.
    """

    samples_teacher = True
    _without_gradient: Callable[[], Any] = torch.inference_mode

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        lora: LoraOptions | None = None,
        teacher_follows: bool = True,
        teacher_model: str | None = None,
        micro_batch_tokens: Budget = "auto",
        max_sessions: int = 256,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        gradient_checkpointing: bool = False,
        in_thread: bool = False,
        decode: Kind = "auto",
    ) -> None:
        self.version = 0
        self.device = pick_device(device)
        self._base = resolve(model)
        self.model, self.tokenizer = load_model(model, dtype=dtype, device=self.device, lora=lora)
        config: Any = self.model.config
        self.stop_tokens = stop_tokens(self.model, self.tokenizer)
        self.max_length = longest_sequence(config)
        self.vocabulary = vocabulary(config)
        self.lora = lora is not None
        if gradient_checkpointing:
            enable_recomputation(self.model)
            if lora:
                self.model.enable_input_require_grads()  # type: ignore[operator]
        self._student = Network(self.model, TrunkAndHead(self.model), self.vocabulary, self.device)
        self._external: Network | None = None  # the teacher, if it is another model
        if teacher_model is not None:
            teacher = load_teacher(teacher_model, self.model, self.tokenizer, dtype=dtype, device=self.device)
            self._external = replace(self._student, run=teacher, split=TrunkAndHead(teacher))
            self.max_length = min(self.max_length, longest_sequence(teacher.config))
            verify_model(teacher, self._external, teacher_model)
        verify_model(self.model, self._student, model)
        self._prepare_training(betas=betas, weight_decay=weight_decay)
        self._max_grad_norm = max_grad_norm
        estimated = self.model, self._base, self.optimiser, lora, gradient_checkpointing
        self.micro_batches = MicroBatches(budget_of(micro_batch_tokens, *estimated))
        self._in_thread = in_thread
        self._teacher_follows = teacher_follows
        self.teacher: dict[str, Tensor] | None = None  # the snapshot; None if the teacher follows or is another model
        self.teacher_averages: dict[str, Tensor] = {}  # float32 copies of an averaged snapshot's bfloat16 weights
        self.student_moved = False  # since the last sync
        self._since_step: list[Callable[[], Metrics]] = []  # each adds its part of the gradient
        self._loss_is_finite = True  # of everything accumulated since the last step
        self.decoders = {weights: self._decoder(weights, decode, max_sessions) for weights in get_args(Weights)}
        self._exported: nn.Module = self.model  # what is written: the student, whole
        self._written = export.WrittenCheck(self.model, self._base, self._predicted, self.vocabulary, self.max_length)
        self._sync_teacher(1.0)

    def _prepare_training(self, **options: Any) -> None:
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimiser = MasterAdamW(self.trainable.values(), **options)

    def _snapshot(self) -> dict[str, Tensor]:
        """The trainable weights of a teacher of its own."""
        return {name: p.detach().clone() for name, p in self.trainable.items()}

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        return await self.sample_by(self.decoders, request)

    async def sample_by(self, decoders: Mapping[Weights, DecodeLoop], request: SampleRequest) -> Sample:
        """`sample` by these decoders."""
        check_request(request, self.max_length)
        weights = request.weights
        if weights == "teacher":
            self._check_teacher()
            if self._teacher_is_student:  # share its decode batch
                weights = "student"
        try:
            tokens, logprobs, stopped = await decoders[weights].sample(request)
        except FloatingPointError as error:
            raise not_finite(f"{weights}'s logits", self.version) from error
        return Sample(tokens, logprobs, "stop" if stopped else "length", self.version)

    def end_session(self, session: str) -> None:
        for decoder in self.decoders.values():
            decoder.end_session(session)

    async def load(self, weights: WeightsHandle) -> None:
        """Checks the version only: sampling uses the weights in training, and `step` clears the KV caches."""
        if weights.location is not None or weights.version != self.version:
            raise ValueError(
                f"the embedded engine samples from its own weights, version {self.version}, and can't load {weights}"
            )

    def _decoder(self, weights: Weights, kind: Kind, most: int) -> Decoder:
        forward = partial(self._decode, weights)
        steps = make_steps(kind, forward, self.device, vocabulary=self.vocabulary, most=most)
        return Decoder(steps, self.stop_tokens, most)

    def _decode(self, weights: Weights, ids: Tensor, plan: Plan, places: Tensor | None) -> Tensor:
        return self._network(weights).decode(ids, plan, places)

    # -- scoring and training -----------------------------------------------------------------------------------

    async def logprobs(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        want: Want = CHOSEN,
    ) -> list[TokenLogprobs]:
        return await self._compute("scoring", lambda: self._logprobs(sequences, weights, temperature, want))

    async def forward_backward(self, batch: Sequence[TrainItem], loss: Loss, *, temperature: float = 1.0) -> Metrics:
        return await self._compute("computing gradients", lambda: self._forward_backward(batch, loss, temperature))

    async def step(self, learning_rate: float) -> StepReport:
        return await self._compute("updating the weights", lambda: self._step(learning_rate))

    async def _compute(self, phase: Phase, work: Callable[[], T]) -> T:
        with explained(phase):
            return await asyncio.to_thread(work) if self._in_thread else work()

    def _logprobs(
        self, sequences: Sequence[TokenSequence], weights: Weights, temperature: float, want: Want
    ) -> list[TokenLogprobs]:
        self.check_scoring(sequences, weights, want)
        self._release()
        score = partial(self._score, sequences, weights, temperature, want)
        return self.micro_batches.until_they_fit(score, score)

    def _score(
        self, sequences: Sequence[TokenSequence], weights: Weights, temperature: float, want: Want
    ) -> list[TokenLogprobs]:
        scored: dict[int, TokenLogprobs] = {}
        for part, shared in self.micro_batches.of(sequences):
            found = self._score_pass([sequences[i] for i in part], shared, weights, temperature, want)
            scored.update(zip(part, found, strict=True))
        return [scored[i] if i in scored else nothing(want, self.vocabulary) for i in range(len(sequences))]

    def _score_pass(
        self,
        sequences: Sequence[TokenSequence],
        shared: Sequence[int],
        weights: Weights,
        temperature: float,
        want: Want,
    ) -> list[TokenLogprobs]:
        """The log-probs of one micro-batch."""
        with self._without_gradient():
            read_off = self._network(weights).forward(sequences, shared, temperature, want)
        if torch.isnan(read_off[0]).any():
            raise not_finite(f"{weights}'s log-probs", self.version)
        counts = [s.marked for s in sequences]
        pieces = zip(*(found.cpu().split(counts) for found in read_off), strict=True)
        return [TokenLogprobs(*(piece.clone() for piece in found)) for found in pieces]

    def _forward_backward(self, batch: Sequence[TrainItem], loss: Loss, temperature: float) -> Metrics:
        self.check_lengths([item.sequence for item in batch])
        if wanted_by(loss).kind == "top_k":
            check_candidates(batch, self.vocabulary)
        self._release()
        accumulate = partial(self._accumulate, batch, loss, temperature)

        def again() -> Metrics:
            self.optimiser.zero_grad()  # the backward pass that failed may have added a part of its gradient
            for earlier in self._since_step:
                earlier()
            return accumulate()

        metrics = self.micro_batches.until_they_fit(accumulate, again)
        self._since_step.append(accumulate)
        return metrics

    def _accumulate(self, batch: Sequence[TrainItem], loss: Loss, temperature: float) -> Metrics:
        passes = self.micro_batches.of([item.sequence for item in batch])
        return add_metrics(
            self._train_pass([batch[i] for i in part], shared, loss, temperature) for part, shared in passes
        )

    def _train_pass(self, items: Sequence[TrainItem], shared: Sequence[int], loss: Loss, temperature: float) -> Metrics:
        """Add the gradient of one micro-batch."""
        with recomputed_activations(self.model):
            value, metrics = self._network("student").backward(items, shared, temperature, loss)
        # A loss can be infinite while its gradient is finite: `step` has to refuse that too.
        self._loss_is_finite &= math.isfinite(value)
        return metrics

    def _step(self, learning_rate: float) -> StepReport:
        norm = self.optimiser.clip(self._max_grad_norm)
        # One non-finite entry makes the norm non-finite, so checking the norm checks every gradient.
        finite = self._loss_is_finite and math.isfinite(norm)
        self._loss_is_finite = True
        self._since_step.clear()
        if finite:
            self.forget_caches()
            self.optimiser.step(learning_rate)
            self.student_moved = True
            self.version += 1
        self.optimiser.zero_grad()
        return StepReport(applied=finite, grad_norm=norm, version=self.version)

    # -- the teacher --------------------------------------------------------------------------------------------

    async def sync_teacher(self, rate: float = 1.0) -> None:
        with explained("updating the weights"):
            self._sync_teacher(rate)

    def check_sync(self, rate: float) -> None:
        """Refuse what `sync_teacher` promises to refuse."""
        check_rate(rate, averages=self._external is not None or not self._teacher_follows)

    def _sync_teacher(self, rate: float) -> None:
        self.check_sync(rate)
        if self._external is not None:
            return
        if not self._teacher_follows:
            self.decoders["teacher"].clear()
            if self.teacher is None:
                self.teacher = self._snapshot()
            else:
                move_towards(self.optimiser, self.teacher, self.teacher_averages, rate)
        self.student_moved = False

    @property
    def _teacher_is_student(self) -> bool:
        return self.teacher is None and self._external is None

    def _check_teacher(self) -> None:
        if self._teacher_is_student and self.student_moved:
            raise StaleTeacherError(STALE)

    # -- memory and models --------------------------------------------------------------------------------------

    def forget_caches(self) -> None:
        """Drop all keys and values: the weights are about to change, or have changed."""
        for decoder in self.decoders.values():
            decoder.clear()

    def _release(self) -> None:
        """Free the memory of the KV caches for scoring and training."""
        for decoder in self.decoders.values():
            decoder.release()

    def check_scoring(self, sequences: Sequence[TokenSequence], weights: Weights, want: Want) -> None:
        """Refuse what `logprobs` promises to refuse."""
        if want.kind == "top_k":
            check_k(want.k, self.vocabulary)
        if weights == "teacher":
            self._check_teacher()
        self.check_lengths(sequences)

    def check_lengths(self, sequences: Sequence[TokenSequence]) -> None:
        longest = max((len(s.tokens) for s in sequences), default=0)
        if longest > self.max_length:
            raise ValueError(f"a sequence has {longest} tokens, but the model takes at most {self.max_length}")

    def _network(self, weights: Weights) -> Network:
        """The model that computes with these weights."""
        if weights == "teacher" and self._external is not None:
            return self._external
        if weights == "teacher" and self.teacher is not None:
            return replace(self._student, run=with_weights(self.model, self.teacher))
        return self._student

    # -- weights out and in -------------------------------------------------------------------------------------

    async def publish(self, folder: Path | None = None) -> WeightsHandle:
        if folder is None:
            return WeightsHandle(self.version)
        export.write_for_sampler(self._exported, folder)
        self._written.check_once("published", folder, self.version)
        return WeightsHandle(self.version, str(folder))

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return export.merged_weights(export.without_adapters(self._exported)).items()

    @property
    def published_bytes(self) -> int:
        return export.bytes_written(self.model)

    async def export(self, folder: Path, *, merge: bool = False) -> None:
        if merge and not self.lora:
            raise UserError("all weights were trained, so there is no adapter to merge: leave out --merge")
        if merge:
            folder.mkdir(parents=True, exist_ok=True)
            export.write_merged(self._exported, folder, untie=False)
            self.tokenizer.save_pretrained(folder)
        else:
            self.save_weights(folder)
        self._written.check(folder, adapter=self.lora and not merge)

    def save_weights(self, folder: Path) -> None:
        """The student's weights (under LoRA the adapter) and tokenizer, in the format of ``transformers``."""
        self._exported.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
        if self.lora:
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card

    def _predicted(self, sequence: TokenSequence) -> TokenLogprobs:
        [found] = self._logprobs([sequence], "student", 1.0, WHOLE)
        return found

    async def save_state(self, folder: Path) -> None:
        self.save_weights(folder / "model")
        state.save(self, folder / state.FILE)
        self._written.check_once("checkpoint", folder / "model", self.version, adapter=self.lora)

    async def load_state(self, folder: Path) -> None:
        state.load(self, folder / state.FILE)
        self._loss_is_finite = True
        self._since_step.clear()
        self.forget_caches()
