"""What an engine can do, and what a run needs of it. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do. A recipe that needs more is refused at the start.

    Attributes:
        distribution: log-probs of the whole vocabulary or of the top k, for exact divergences.
        temperature: sampling and scoring at temperatures other than 1.
        teacher_snapshot: a teacher with weights of its own (frozen, or synchronised every few iterations).
        teacher_average: a teacher that is a moving average of the student.
        teacher_external: a teacher that is another model.
        teacher_sampling: rollouts by the teacher.
        lora: adapters instead of all weights.
        refuses_non_finite: a step from a loss or gradient that is not finite changes nothing.
        deterministic: the same seeds give the same bits on the same machine.
        exact_resume: training goes on from a checkpoint bit for bit.
        publishes_folder: weights can be published as a model folder, for samplers such as vLLM.
        concurrent: rollouts can be sampled, with the weights that were published last, while the learner scores and
            trains.
    """

    distribution: bool = False
    temperature: bool = False
    teacher_snapshot: bool = False
    teacher_average: bool = False
    teacher_external: bool = False
    teacher_sampling: bool = False
    lora: bool = False
    refuses_non_finite: bool = False
    deterministic: bool = False
    exact_resume: bool = False
    publishes_folder: bool = False
    concurrent: bool = False


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters.

    Attributes:
        adapter: folder of an existing adapter to go on training; it has a form of its own.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    adapter: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """What a run needs of its engine, whatever the engine: made from the recipe, before a model is loaded.

    Attributes:
        model: a model's name, folder or hub name.
        teacher: ``student``: its weights are the student's at every sync, so it needs none of its own; ``snapshot``: a
            copy; ``external``: the model `teacher_model`; ``none``: there is none.
        teacher_average: the copy is a moving average.
        max_sessions: the most episodes under way at once.
        max_sampled_tokens: the most tokens of a sequence that has to be sampled, and the settings that this follows
            from. None: as many as the model takes.
        context_tokens: the most tokens that a skill adds to a prompt; sampling with one may be asked for later.
        micro_batch_tokens: the most tokens of one forward pass of scoring or training; ``auto``: by the free memory.
        in_thread: other work of the event loop has to go on during scoring and training.
        ahead: rollouts are sampled while the learner scores and trains, if the engine is ``concurrent``.
        needs: capability -> the setting that needs it.
    """

    model: str
    seed: int
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    lora: LoraOptions | None = None
    gradient_checkpointing: bool = False
    teacher: Literal["none", "student", "snapshot", "external"] = "none"
    teacher_average: bool = False
    teacher_model: str | None = None
    max_sessions: int = 256
    max_sampled_tokens: tuple[int, str] | None = None
    context_tokens: int = 0
    micro_batch_tokens: int | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    in_thread: bool = False
    ahead: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
