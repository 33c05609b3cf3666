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
from skillsd.engines.torch.halves import Halves, in_chunks
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

Wanted = Callable[..., tuple[Tensor, ...]]
"""(log-probs ``[tokens, vocabulary]``, the tokens' ids ``[tokens]``, ...) -> tensors with a row a token."""


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
        self._halves = Halves(self.model)
        self._external_halves = Halves(self._external) if self._external is not None else None
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
            return self._decode(ids, plan, places, weights)

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
        wanted = self._score(sequences, weights, temperature, (lambda full, ids: (full,)) if distribution else _chosen)
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
        wanted = self._score(sequences, weights, temperature, lambda full, ids: (*_chosen(full, ids), *top_k(full, k)))
        return [TopK(*found) if found else nothing(k) for found in wanted]

    def _score(
        self,
        sequences: Sequence[TokenSequence],
        weights: Weights,
        temperature: float,
        wanted: Wanted,
    ) -> list[list[Tensor]]:
        """What is wanted of each sequence's marked tokens, on the CPU; nothing where none is marked."""
        if weights == "teacher":
            self._check_teacher()
        self._check_lengths(sequences)
        self._release()
        results: list[list[Tensor]] = [[] for _ in sequences]
        with torch.inference_mode():
            for part, shared in self._micro_batches(sequences):
                counts = [sequences[i].marked for i in part]
                for found in self._read([sequences[i] for i in part], shared, weights, temperature, wanted):
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
        self._release()
        parts: list[dict[str, Mean]] = []
        wanted: Wanted = _chosen
        if coarse:
            wanted = lambda full, ids, candidates: (*_chosen(full, ids), coarse_grain(full, candidates))  # noqa: E731
        elif distribution:
            wanted = lambda full, ids: (*_chosen(full, ids), full)  # noqa: E731
        for part, shared in self._micro_batches([item.sequence for item in batch]):
            items = [batch[i] for i in part]
            with self._checkpoints():
                names = items[0].signals.keys()
                signals = {name: torch.cat([item.signals[name] for item in items]).to(self.device) for name in names}
                more = [signals["candidates"]] if coarse else []
                sequences = [item.sequence for item in items]
                value, metrics = loss(
                    TokenLogprobs(*self._read(sequences, shared, "student", temperature, wanted, *more)), signals
                )
                # A loss can be infinite while its gradient is not: `step` has to refuse that too.
                self._loss_is_finite &= bool(torch.isfinite(value.detach()))
                value.backward()
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

    def _micro_batches(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[list[int], list[int]]]:
        """Indices of sequences that go together, and how many first tokens each has in common with the one before it.

        Those tokens are computed once. Sequences of one prompt stand together, prompts in the order of their longest
        sequence. The budget is of tokens that are computed; what is shared and padding count too, half.
        """
        prompts: dict[tuple[int, ...], list[int]] = {}
        for i, sequence in enumerate(sequences):
            if sequence.marked:
                prompts.setdefault(sequence.tokens[: sequence.mask.index(True)], []).append(i)
        groups = sorted(prompts.values(), key=lambda group: max(len(sequences[i].tokens) for i in group))
        part: list[int] = []
        shared: list[int] = []
        size = longest = 0
        for i in [i for group in groups for i in sorted(group, key=lambda i: sequences[i].tokens)]:
            tokens = sequences[i].tokens
            common = _common_prefix(sequences[part[-1]].tokens, tokens) if part else 0
            longest = max(longest, len(tokens))
            tokens_too_many = size + len(tokens) - common > self._micro_batch_tokens
            if part and (tokens_too_many or longest * (len(part) + 1) > 2 * self._micro_batch_tokens):
                yield part, shared
                part, shared, size, longest, common = [], [], 0, len(tokens), 0
            part.append(i)
            shared.append(common)
            size += len(tokens) - common
        if part:
            yield part, shared

    def _release(self) -> None:
        """Give the memory of keys and values back: scoring and training need it."""
        for sampler in self.samplers.values():
            sampler.release()

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

    def _read(
        self,
        sequences: Sequence[TokenSequence],
        shared: Sequence[int],
        weights: Weights,
        temperature: float,
        wanted: Wanted,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        """One forward pass: what is `wanted` of the marked tokens of all sequences, a row each.

        Args:
            shared: of each sequence, how many first tokens are those of the one before it.
            more: tensors ``[marked, ...]`` that `wanted` gets beside the log-probs.
        """
        plan = PackedPlan([len(s.tokens) for s in sequences], self.device, shared)
        ids = torch.tensor([t for s, taken in zip(sequences, shared, strict=True) for t in s.tokens[taken:]])
        # The token at place i is predicted from place i - 1: the head runs there and nowhere else.
        marked = [torch.tensor(s.mask).nonzero().squeeze(1) for s in sequences]
        places = torch.cat([source[at - 1] for source, at in zip(plan.source, marked, strict=True)])
        targets = torch.tensor(
            [t for s in sequences for t, is_marked in zip(s.tokens, s.mask, strict=True) if is_marked]
        )
        run, halves = self._runner(weights)
        inputs = {"input_ids": ids.to(self.device).unsqueeze(0), "position_ids": plan.positions}
        hidden = halves.hidden(run, **inputs, use_cache=False, plan=plan).index_select(0, places.to(self.device))

        def compute(hidden: Tensor, targets: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
            logits = halves.logits(run, hidden)[:, : self._vocabulary].float()
            if temperature != 1:
                logits = logits / temperature
            return wanted(torch.log_softmax(logits, dim=-1), targets, *more)

        return in_chunks(hidden, targets.to(self.device), self._vocabulary, compute, *more)

    def _decode(self, ids: Tensor, plan: CachedPlan, places: Tensor, weights: Weights) -> Tensor:
        """Logits ``[places, vocabulary]`` of packed ids ``[tokens]`` at the given places."""
        run, _ = self._runner(weights)
        inputs = {"input_ids": ids.unsqueeze(0), "position_ids": plan.positions, "logits_to_keep": places}
        logits: Tensor = run(**inputs, use_cache=False, plan=plan).logits[0, :, : self._vocabulary]
        return logits

    def _runner(self, weights: Weights) -> tuple[Callable[..., Any], Halves]:
        """The forward pass under these weights, and the halves of the model that it runs."""
        if weights == "teacher" and self._external is not None:
            assert self._external_halves is not None
            return self._external, self._external_halves
        if weights == "teacher" and self._teacher is not None:
            teacher = self._teacher
            return lambda **inputs: torch.func.functional_call(self.model, teacher, (), inputs), self._halves
        return self.model, self._halves

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
            self._averages = _copies(state["teacher_averages"], self.device)
        self._student_moved = state["student_moved"]
        self._optimiser.load_state_dict(state["optimiser"])
        self._optimiser.zero_grad()
        self._loss_is_finite = True
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)
        for sampler in self.samplers.values():
            sampler.clear()


def _chosen(full: Tensor, ids: Tensor) -> tuple[Tensor]:
    return (full.gather(1, ids.unsqueeze(1)).squeeze(1),)


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many first tokens two sequences have in common."""
    same, differs = 0, min(len(a), len(b)) + 1  # a[:same] == b[:same], and not so for `differs`
    while differs - same > 1:
        middle = (same + differs) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differs = middle
    return same


def _copies(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in weights.items()}


def _forms(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
