"""The keys of a training recipe, their defaults and what they mean.

Every default is the setting that was vetted for the paper's set-up or the field's habit, and its docstring says which.
`skillsd config` prints them, and ``docs/configuration.md`` is generated from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from skillsd.config.skills import SkillsSection, SummariserSection
from skillsd.engines import registry
from skillsd.engines.options import EngineOptions
from skillsd.engines.torch.options import TorchOptions
from skillsd.errors import UserError, unknown_name
from skillsd.methods import METHODS
from skillsd.options import JsonObject, NameOrPath, Options


class LoraSection(Options):
    """Low-rank adapters (Hu et al., 2021) instead of all weights."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(32, ge=1)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Which modules get adapters, as peft takes it: ``all-linear``, a list of name endings, or a pattern."""


class ModelSection(Options):
    """The student."""

    name: str = "nano"
    """A model by name (``nano`` ships with the package, ``smollm2-135m`` is fetched by pip), a local folder, or a hub
    name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the weights. With ``bfloat16`` the optimiser keeps float32 master weights."""
    device: str = "auto"
    """``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch. None leaves torch's own choice. Results are bit-identical only with the same number."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights."""
    adapter: str | None = None
    """A folder with an adapter for the model, as peft writes it: go on training that one, instead of ``lora``."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward pass."""
    chat_template_kwargs: JsonObject = Field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. ``{enable_thinking: false}``. docs/models.md."""


class EnvironmentSection(Options):
    """What the agent acts in."""

    name: str = "sokoban"
    """A registered environment (`skillsd envs list`), or ``module:Class``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the environment's task set as keyword arguments."""


class RolloutSection(Options):
    """How episodes are sampled."""

    tasks_per_iteration: int = Field(16, ge=1)
    """Tasks of one iteration; each is one group."""
    group_size: int = Field(8, ge=2)
    """G: episodes per task. The paper does not give it."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling distribution. Log-probs for the loss are taken at the same temperature."""
    turn_tokens: int = Field(256, ge=1)
    """The most tokens the student may sample in one turn."""
    trajectory_tokens: int = Field(4096, ge=2)
    """The most tokens of a whole trajectory, prompt included."""
    step_seconds: float = Field(60.0, gt=0)
    """Deadline of one call to the environment."""
    retries: int = Field(2, ge=0)
    """New attempts at an episode that the infrastructure broke; after that its group is dropped."""
    concurrency: int = Field(256, ge=1)
    """The most episodes under way at once."""


class TermSection(Options):
    """A loss term of your own; see examples/custom_loss.py."""

    name: str
    """Name of the term, and of its metric."""
    fn: str
    """``module:function``: (student's log-probs, signals) -> losses ``[tokens]``."""
    weight: float = 1.0
    """Weight of the term."""
    mask: Literal["action_mask", "teacher_mask", "imitation_mask"] = "action_mask"
    """The tokens that it applies to."""
    normaliser: Literal["action_mask", "teacher_mask", "imitation_mask"] | None = None
    """The tokens whose number the sum is divided by; None: those of ``mask``."""


ESTIMATORS = ("iw_k3", "iw_k1", "k1", "k2", "k3", "reverse_kl", "forward_kl")
"""Names in `skillsd.objective.ESTIMATORS`, which imports torch."""


class ObjectiveSection(Options):
    """The loss: L = reward_weight * L_GRPO + lambda_sdl * L_SDL."""

    reward_weight: float | None = Field(None, ge=0)
    """Weight of L_GRPO. None takes the method's."""
    lambda_sdl: float | None = Field(None, ge=0)
    """Weight of L_SDL beside the reward; None takes the method's (the paper's 0.001). Has no effect without a teacher,
    or in methods that are distillation alone (OPD, OPSD): their weight is 1."""
    lambda_schedule: Literal["constant", "linear_decay", "cosine"] = "constant"
    """How ``lambda_sdl`` changes over the training. The paper's: constant."""
    imitation_weight: float | None = Field(None, ge=0)
    """Weight of the self-imitation term; None takes the method's. Has no effect in a method without it."""
    estimator: Annotated[str, NameOrPath("estimator", ESTIMATORS)] = "iw_k3"
    """How the divergence is estimated (`skillsd.objective.ESTIMATORS`): ``iw_k3`` (the paper's), ``iw_k1``, ``k1``,
    ``k2``, ``k3``, ``reverse_kl``, ``forward_kl``, or ``module:attribute`` of your own."""
    top_k: int | None = Field(None, ge=1)
    """For ``reverse_kl`` and ``forward_kl`` with a large vocabulary: only the teacher's k most likely tokens and one
    bucket for the rest. None takes the whole vocabulary."""
    clip_low: float = Field(0.2, ge=0)
    """How far the ratio may fall below 1. Not given in the paper; 0.2 is the field's habit."""
    clip_high: float = Field(0.2, ge=0)
    """How far the ratio may rise above 1."""
    distil_clamp: float | None = Field(None, gt=0)
    """A change of method, off by default: tokens with a larger |l| get no distillation gradient, and are counted."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling between sampler and learner: the policy term is weighted by min(ratio of their
    log-probs, this). Costs one pass of scoring. None is off; 2 is usual if vLLM samples."""
    scale_by_std: bool = True
    """Divide the group's advantages by their standard deviation."""
    terms: list[TermSection] = Field(default_factory=list)
    """More loss terms of your own."""


class TeacherSection(Options):
    """The teacher's weights."""

    sync_every: int = Field(1, ge=1)
    """A synchronised teacher takes the student's weights every so many iterations; 1 needs no copy of the weights."""
    ema: float | None = Field(None, gt=0, lt=1)
    """A synchronised teacher keeps this share of its own weights at each sync: an exponential moving average."""
    model: str | None = None
    """An external teacher: a model's name or folder, with the student's tokenizer. Only for methods with one."""
    max_group_reward: float | None = Field(None, ge=0, le=1)
    """A change of method, off by default: a group with a higher mean reward gets no teacher."""


class TrainingSection(Options):
    """The optimiser's steps."""

    iterations: int = Field(100, ge=0)
    """Length of the training."""
    learning_rate: float = Field(1e-6, gt=0)
    """Not given in the paper; 1e-6 is the field's habit for full weights of a 4B model."""
    warmup_iterations: int = Field(0, ge=0)
    """Iterations over which the learning rate rises linearly."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps per epoch over the collected groups."""
    epochs: int = Field(1, ge=1)
    """Passes over the collected groups."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """The gradient is clipped to this norm; ``.inf`` does not clip."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens in one forward pass of scoring or training. Changes memory and speed, not the gradient."""


class CurriculumSection(Options):
    """Which tasks are trained on, and when."""

    tasks: int | None = Field(None, ge=1)
    """Train on this many of the environment's training tasks, evenly spaced from easy to hard. None takes all."""
    easy_first: bool = False
    """Begin with the easiest tasks and add harder ones as training goes on (the paper's Sokoban)."""
    full_at: float = Field(0.5, gt=0, le=1)
    """Share of the training after which every task is in."""


class EvaluationSection(Options):
    """The learning curve: held-out tasks under the plain prompt."""

    split: str = "tune"
    """Split that the learning curve is measured on. Never the training split; keep ``test`` for the end."""
    every: int = Field(10, ge=0)
    """Iterations between evaluations; 0 evaluates only before the first and after the last iteration."""
    limit: int | None = Field(None, ge=1)
    """Only this many tasks, evenly spaced from easy to hard."""
    samples: int = Field(1, ge=1)
    """Sampled episodes per task."""
    greedy: bool = False
    """Also play each task once greedily."""


class CheckpointSection(Options):
    """Checkpoints, for ``--resume`` and evaluation."""

    every: int = Field(10, ge=0)
    """Iterations between checkpoints; 0 writes only the last one."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints that are kept; older ones are deleted."""


class LogSection(Options):
    """What is written besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Project name of Weights & Biases (needs the extra ``wandb``)."""
    trajectories_every: int = Field(1, ge=0)
    """Trajectories of every n-th iteration are written; 0 writes none."""


def _engine_options(section: Any) -> EngineOptions:
    """The section ``engine`` by its own engine's options class. A key of another engine is named as such."""
    if isinstance(section, EngineOptions):
        return section
    if not isinstance(section, Mapping):
        raise ValueError("expected keys and values of its own")
    try:
        return registry.options(section)  # a ValidationError of its own keeps its locations
    except UserError as error:
        raise ValueError(str(error)) from error


def engine_schema() -> dict[str, Any]:
    """JSON schema of the section ``engine``: that of any registered engine."""
    classes = [registry.options_class(name) for name in registry.names()]
    return {"anyOf": [kind.model_json_schema() for kind in classes]}


EngineSection = Annotated[
    EngineOptions,
    PlainValidator(_engine_options),
    PlainSerializer(lambda options: options.model_dump()),
    WithJsonSchema({"type": "object"}),
]


class RunConfig(Options):
    """One training run."""

    name: str
    """Name of the run; part of its default folder."""
    method: str = "skill-sd"
    """A row of `skillsd methods`."""
    seed: int = Field(0, ge=0)
    """Of everything random in the run."""
    model: ModelSection = ModelSection()
    engine: EngineSection = TorchOptions()
    environment: EnvironmentSection = EnvironmentSection()
    rollout: RolloutSection = RolloutSection()
    objective: ObjectiveSection = ObjectiveSection()
    teacher: TeacherSection = TeacherSection()
    skills: SkillsSection = SkillsSection()
    summariser: SummariserSection = SummariserSection()
    training: TrainingSection = TrainingSection()
    curriculum: CurriculumSection = CurriculumSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @property
    def episodes_per_iteration(self) -> int:
        """The most episodes of an iteration, those that measure uplift included."""
        measured = METHODS[self.method].uses_skills and self.skills.credit == "uplift"
        return self.rollout.tasks_per_iteration * (
            self.rollout.group_size + (self.skills.uplift_episodes if measured else 0)
        )

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(str(unknown_name("method", name, METHODS)))
        return name

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError("must be usable as a folder's name")
        return name
