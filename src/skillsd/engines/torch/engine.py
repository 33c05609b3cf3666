"""The six calls over a `transformers` causal LM in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skillsd.engines.base import (
    Engine,
    LossFunction,
    Sample,
    SampleRequest,
    StaleTeacherError,
    StepReport,
    TokenSequence,
    TopK,
    TrainItem,
    Weights,
)
from skillsd.engines.candidates import check_candidates, check_k, coarse_grain, nothing, top_k
from skillsd.engines.torch.attention import CachedPlan, PackedPlan
from skillsd.engines.torch.models import (
    LoraOptions,
    add_lora,
    load_model,
    load_teacher,
    longest_sequence,
    pick_device,
    stop_tokens,
    vocabulary,
)
from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.sampler import Sampler
from skillsd.errors import UserError
from skillsd.metrics import Mean, add_metrics
from skillsd.objective import TokenLogprobs


class TorchEngine(Engine):
    """One process, one device.

    Args:
        model: a shipped model's name, a local folder or a hub name.
        dtype: ``float32`` or ``bfloat16`` (then with float32 master weights in the optimiser).
        device: ``auto``, ``cpu``, ``cuda`` ...
        lora: train adapters instead of all weights.
        teacher_follows: the teacher has no weights of its own: it is the student, as long as the student has not moved
            since the last `sync_teacher`. Right (and free) where every iteration begins with a sync. If False, a
            snapshot of the trainable weights is kept, in their dtype. A moving average of bfloat16 weights
            (`sync_teacher` with a rate below 1) is kept in float32 besides: rounded each time, it would never move.
        teacher_model: the teacher is this other model (named as `model`; a checkpoint's folder ``model`` is one), with
            the student's tokenizer and no adapters. It has nothing to sync, is never stale, is in no checkpoint, and
            `teacher_follows` plays no part. Sequences are limited to what both models take.
        micro_batch_tokens: the most tokens in one forward pass of scoring or training (a longer sequence goes alone).
        max_sessions: the most episodes whose keys and values are kept at once.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        lora: LoraOptions | None = None,
        teacher_follows: bool = True,
        teacher_model: str | None = None,
        micro_batch_tokens: int = 8192,
        max_sessions: int = 256,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.device = pick_device(device)
        loaded, self.tokenizer = load_model(model, dtype=dtype, device=self.device)
        self.stop_tokens = stop_tokens(loaded, self.tokenizer)
        self.max_length = longest_sequence(loaded.config)
        self._vocabulary = vocabulary(loaded.config)
        self._external: nn.Module | None = None  # the teacher, where it is another model
        if teacher_model is not None:
            self._external = load_teacher(teacher_model, loaded, self.tokenizer, dtype=dtype, device=self.device)
            self.max_length = min(self.max_length, longest_sequence(self._external.config))
        self.lora = lora is not None
        self.model: nn.Module = add_lora(loaded, lora) if lora else loaded
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            if lora:
                self.model.enable_input_require_grads()  # type: ignore[operator]
        self._checkpointing = gradient_checkpointing
        self._trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._optimiser = MasterAdamW(self._trainable.values(), betas=betas, weight_decay=weight_decay)
        self._max_grad_norm = max_grad_norm
        self._micro_batch_tokens = micro_batch_tokens
        self._teacher_follows = teacher_follows
        self._teacher: dict[str, Tensor] | None = None  # the snapshot; None where the teacher follows or is another
        self._averages: dict[str, Tensor] = {}  # in float32, of those weights of an averaged snapshot that are not
        self._student_moved = False  # since the last sync
        self._loss_is_finite = True  # of everything accumulated since the last step
        self.samplers = {
            "student": Sampler(self._decoder("student"), self.stop_tokens, self.device, max_sessions),
            "teacher": Sampler(self._decoder("teacher"), self.stop_tokens, self.device, max_sessions),
        }
        self.sync_teacher()

    # -- sampling -----------------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest) -> Sample:
        needed = len(request.tokens) + request.max_tokens
        if needed > self.max_length:
            raise ValueError(f"{needed} tokens are asked of a model that takes {self.max_length}")
        if request.weights == "teacher":
            self._check_teacher()
            if self._teacher_is_student:  # share its decode batch
                return await self.samplers["student"].sample(request)
        return await self.samplers[request.weights].sample(request)

    def end_session(self, session: str) -> None:
        for sampler in self.samplers.values():
            sampler.end_session(session)

    def _decoder(self, weights: Weights) -> Any:
        def forward(ids: Tensor, plan: CachedPlan, places: Tensor) -> Tensor:
            return self._logits(ids, plan, places, weights)

        return forward

    # -- scoring and training -----------------------------------------------------------------------------------

    def score(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
        distribution: bool = False,
    ) -> list[Tensor]:
        wanted = self._score(sequences, weights, temperature, lambda *both: both[1:] if distribution else both[:1])
        return [found[0] if found else torch.empty(0) for found in wanted]

    def score_top_k(
        self,
        sequences: Sequence[TokenSequence],
        k: int,
        weights: Weights = "student",
        *,
        temperature: float = 1.0,
    ) -> list[TopK]:
        check_k(k, self._vocabulary)
        wanted = self._score(sequences, weights, temperature, lambda chosen, full: (chosen, *top_k(full, k)))
        return [TopK(*found) if found else nothing(k) for found in wanted]

    def _score(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights,
        temperature: float,
        wanted: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> list[list[Tensor]]:
        """What `wanted` makes of ``[marked]`` and ``[marked, vocabulary]``, for each sequence; on the CPU."""
        if weights == "teacher":
            self._check_teacher()
        self._check_lengths(sequences)
        results: list[list[Tensor]] = [[] for _ in sequences]
        with torch.inference_mode():
            for part in self._micro_batches(sequences):
                counts = [sequences[i].marked for i in part]
                for found in wanted(*self._logprobs([sequences[i] for i in part], weights, temperature)):
                    for i, piece in zip(part, found.cpu().split(counts), strict=True):
                        results[i].append(piece.clone())
        return results

    def forward_backward(
        self,
        batch: Sequence[TrainItem],
        loss: LossFunction,
        *,
        temperature: float = 1.0,
        distribution: bool = False,
    ) -> dict[str, Mean]:
        self._check_lengths([item.sequence for item in batch])
        coarse = distribution and any("candidates" in item.signals for item in batch)
        if coarse:
            check_candidates(batch, self._vocabulary)
        for sampler in self.samplers.values():
            sampler.release()
        parts: list[dict[str, Mean]] = []
        for part in self._micro_batches([item.sequence for item in batch]):
            items = [batch[i] for i in part]
            with self._checkpoints():
                names = items[0].signals.keys()
                signals = {name: torch.cat([item.signals[name] for item in items]).to(self.device) for name in names}
                chosen, full = self._logprobs([i.sequence for i in items], "student", temperature)
                if coarse:
                    full = coarse_grain(full, signals["candidates"])
                value, metrics = loss(TokenLogprobs(chosen, full if distribution else None), signals)
                # A loss can be infinite while its gradient is not: `step` has to refuse that too.
                self._loss_is_finite &= bool(torch.isfinite(value.detach()))
                value.backward()
                del full  # [marked, vocabulary] is not to stand beside the next forward pass
            parts.append(metrics)
        return add_metrics(parts)

    def step(self, learning_rate: float) -> StepReport:
        norm = torch.nn.utils.clip_grad_norm_(self._optimiser.masters, self._max_grad_norm)
        # One non-finite entry makes the norm non-finite, so this one number answers for every gradient.
        finite = self._loss_is_finite and bool(torch.isfinite(norm))
        self._loss_is_finite = True
        if finite:
            for sampler in self.samplers.values():
                sampler.clear()
            self._optimiser.step(learning_rate)
            self._student_moved = True
        self._optimiser.zero_grad()
        return StepReport(applied=finite, grad_norm=norm.item())

    # -- the teacher --------------------------------------------------------------------------------------------

    def sync_teacher(self, rate: float = 1.0) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"the rate of a teacher's sync is {rate}; it must be above 0 and at most 1")
        if self._external is not None:
            return
        if self._teacher_follows and rate != 1:
            raise ValueError(
                f"a teacher that follows the student keeps no weights to average with (rate {rate}): sync with rate 1, "
                "or make the engine with teacher_follows=False"
            )
        if not self._teacher_follows:
            self.samplers["teacher"].clear()
            if self._teacher is None or rate == 1:
                self._teacher = {name: p.detach().clone() for name, p in self._trainable.items()}
                self._averages = {}
            else:
                self._average_into(self._teacher, rate)
        self._student_moved = False

    def _average_into(self, teacher: Mapping[str, Tensor], rate: float) -> None:
        for (name, weight), master in zip(teacher.items(), self._optimiser.masters, strict=True):
            if weight.dtype == torch.float32:
                weight.lerp_(master.detach(), rate)
                continue
            if name not in self._averages:
                self._averages[name] = weight.float()
            weight.copy_(self._averages[name].lerp_(master.detach(), rate))

    @property
    def _teacher_is_student(self) -> bool:
        return self._teacher is None and self._external is None

    def _check_teacher(self) -> None:
        if self._teacher_is_student and self._student_moved:
            raise StaleTeacherError(
                "the teacher follows the student and keeps no weights of its own; the student has been updated since "
                "the last sync_teacher(). Sync first, or make the engine with teacher_follows=False"
            )

    # -- forward passes -----------------------------------------------------------------------------------------

    def _micro_batches(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        """Indices of sequences that go together: of like length, their tokens within the budget."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
        part: list[int] = []
        size = 0
        for i in order:
            length = len(sequences[i].tokens)
            if part and size + length > self._micro_batch_tokens:
                yield part
                part, size = [], 0
            if sequences[i].marked:
                part.append(i)
                size += length
        if part:
            yield part

    def _check_lengths(self, sequences: Sequence[TokenSequence]) -> None:
        longest = max((len(s.tokens) for s in sequences), default=0)
        if longest > self.max_length:
            raise ValueError(f"a sequence of {longest} tokens for a model that takes {self.max_length}")

    @contextmanager
    def _checkpoints(self) -> Iterator[None]:
        """Let layers forget their activations, if so configured, without the dropout of training mode."""
        # `transformers` checkpoints a layer whose own training flag is set; its dropouts have flags of their own.
        modules = self.model.modules() if self._checkpointing else ()
        layers = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _logprobs(
        self, sequences: Sequence[TokenSequence], weights: Weights, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the marked tokens of all sequences, flat ``[marked]``, and ``[marked, vocabulary]``."""
        ids = torch.tensor([t for s in sequences for t in s.tokens])
        marked = torch.tensor([m for s in sequences for m in s.mask]).nonzero().squeeze(1)
        targets = ids[marked].to(self.device)
        plan = PackedPlan([len(s.tokens) for s in sequences], self.device)
        # The token at place i is predicted from place i - 1: lm_head runs there and nowhere else.
        logits = self._logits(ids.to(self.device), plan, (marked - 1).to(self.device), weights)
        full = torch.log_softmax(logits.float() / temperature, dim=-1)
        return full.gather(1, targets.unsqueeze(1)).squeeze(1), full

    def _logits(self, ids: Tensor, plan: PackedPlan | CachedPlan, places: Tensor, weights: Weights) -> Tensor:
        """Logits ``[places, vocabulary]`` of packed ids ``[tokens]`` at the given places."""
        inputs: dict[str, Any] = {
            "input_ids": ids.unsqueeze(0),
            "position_ids": plan.positions,
            "use_cache": False,
            "logits_to_keep": places,
            "plan": plan,
        }
        if weights == "teacher" and self._external is not None:
            return self._external(**inputs).logits[0, :, : self._vocabulary]
        if weights == "teacher" and self._teacher is not None:
            return torch.func.functional_call(self.model, self._teacher, (), inputs).logits[0]
        return self.model(**inputs).logits[0]

    # -- saving -------------------------------------------------------------------------------------------------

    def save_weights(self, folder: Path) -> None:
        """The student's weights and tokenizer in the ecosystem's format (under LoRA: the adapter)."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    def save(self, folder: Path) -> None:
        self.save_weights(folder / "model")
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(
            {
                # Exact training weights beside the exported ones: an export may retie or rename.
                "weights": {name: p.detach() for name, p in self._trainable.items()},
                "optimiser": self._optimiser.state_dict(),
                "teacher": self._teacher,
                "teacher_averages": self._averages,
                "student_moved": self._student_moved,
                "rng": rng,
            },
            folder / "engine.pt",
        )

    def load(self, folder: Path) -> None:
        path = folder / "engine.pt"
        if not path.is_file():
            raise UserError(f"no engine state in {str(folder)!r}: expected the file engine.pt of a checkpoint")
        try:
            state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{str(path)!r} is damaged ({str(error).splitlines()[0]}): remove its folder to go on from the one "
                "before it"
            ) from error
        if _forms(state["weights"]) != _forms(self._trainable):
            raise UserError(
                f"the checkpoint {str(folder)!r} holds other weights than the recipe's model has: names, shapes or "
                "dtype differ"
            )
        if self._teacher is not None and state["teacher"] is None and state["student_moved"]:
            raise UserError(
                f"the checkpoint {str(folder)!r} has no teacher: it was written by an engine whose teacher follows the "
                "student, or is another model. Load it with the same settings of the teacher"
            )
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state["weights"][name])
        if self._teacher is not None:
            self._teacher = _copies(state["teacher"] or state["weights"], self.device)
            self._averages = _copies(state.get("teacher_averages", {}), self.device)  # older checkpoints have none
        self._student_moved = state["student_moved"]
        self._optimiser.load_state_dict(state["optimiser"])
        self._optimiser.zero_grad()
        self._loss_is_finite = True
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)
        for sampler in self.samplers.values():
            sampler.clear()


def _copies(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in weights.items()}


def _forms(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
