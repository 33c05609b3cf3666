"""The keys of a training recipe (`skillsd train`), with defaults and meanings.

Defaults follow the paper where it gives a value. `skillsd config` prints the keys, and ``docs/configuration.md`` is
generated from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator, model_validator

from skillsd.config.skills import SkillsSection, SummariserSection
from skillsd.engines import registry
from skillsd.engines.options import EngineOptions
from skillsd.engines.torch.options import TorchOptions
from skillsd.errors import UserError, unknown_name
from skillsd.methods import METHODS
from skillsd.options import JsonObject, NameOrPath, Options


class LoraSection(Options):
    """LoRA (Hu et al., 2021): train low-rank adapters instead of all weights."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(32, ge=1)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get adapters, in peft's notation: ``all-linear``, a list of name endings, or a regex."""


class ModelSection(Options):
    """The model that is trained: the student."""

    name: str = "nano"
    """A named model (`skillsd models list`), a local folder, or a Hugging Face hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the weights. With ``bfloat16`` the optimiser keeps master weights in float32."""
    device: str = "auto"
    """``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch. Default: torch's own choice. Results are bit-identical only with the same number."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights; ``{}`` takes their defaults."""
    adapter: str | None = None
    """Folder of an existing adapter in peft's format, to continue training it. Excludes ``lora``."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, at the cost of another forward pass."""
    chat_template_kwargs: JsonObject = Field(default_factory=dict)
    """Arguments for the tokenizer's chat template, e.g. ``{enable_thinking: false}``. See docs/models.md."""


OWN_SEED = "$seed"
"""The value of an environment's option that stands for the run's seed, such as a world of its own for each seed."""


def with_own_seed(recipe: Any) -> Any:
    """The recipe's data with its seed in place of `OWN_SEED`."""
    environment = recipe.get("environment") if isinstance(recipe, Mapping) else None
    options = environment.get("options") if isinstance(environment, Mapping) else None
    if not isinstance(options, Mapping) or OWN_SEED not in options.values():
        return recipe
    seed = recipe.get("seed", 0)
    filled = {name: seed if value == OWN_SEED else value for name, value in options.items()}
    return {**recipe, "environment": {**dict(environment or {}), "options": filled}}


class EnvironmentSection(Options):
    """The environment that the agent acts in."""

    name: str = "sokoban"
    """A registered environment (`skillsd envs list`), or ``module:Class``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the environment's task set. The value ``$seed`` is replaced by the run's ``seed``."""


class RolloutSection(Options):
    """How episodes are sampled."""

    tasks_per_iteration: int = Field(16, ge=1)
    """Tasks per iteration, one group of episodes each."""
    group_size: int = Field(8, ge=2)
    """G: episodes per group. Not given in the paper."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. Log-probs for the loss are computed at the same temperature."""
    turn_tokens: int = Field(256, ge=1)
    """Maximum sampled tokens per turn."""
    trajectory_tokens: int = Field(4096, ge=2)
    """Maximum tokens per trajectory, including the prompt."""
    step_seconds: float = Field(60.0, gt=0)
    """Timeout of one call to the environment."""
    retries: int = Field(2, ge=0)
    """Further attempts at an episode after an infrastructure failure; if all fail, its group is dropped."""
    concurrency: int = Field(256, ge=1)
    """Maximum number of concurrent episodes."""


class TermSection(Options):
    """A custom loss term; see examples/custom_loss.py."""

    name: str
    """Name of the term and of its metric."""
    fn: str
    """``module:function``: (student's log-probs, signals) -> losses ``[tokens]``."""
    weight: float = 1.0
    """Weight of the term."""
    mask: Literal["action_mask", "teacher_mask", "imitation_mask"] = "action_mask"
    """Tokens that the term applies to."""
    normaliser: Literal["action_mask", "teacher_mask", "imitation_mask"] | None = None
    """Tokens whose count divides the sum. Default: those of ``mask``."""


ESTIMATORS = ("iw_k3", "iw_k1", "k1", "k2", "k3", "reverse_kl", "forward_kl")
"""Names in `skillsd.objective.ESTIMATORS`, which imports torch."""


class ObjectiveSection(Options):
    """The loss: L = reward_weight * L_GRPO + lambda_sdl * L_SDL."""

    reward_weight: float | None = Field(None, ge=0)
    """Weight of L_GRPO. Default: the method's."""
    lambda_sdl: float | None = Field(None, ge=0)
    """Weight of L_SDL. Default: the method's (0.001, as in the paper). Has no effect without a teacher, or in
    distillation-only methods (OPD, OPSD), where the weight is 1."""
    lambda_schedule: Literal["constant", "linear_decay", "cosine"] = "constant"
    """Schedule of ``lambda_sdl`` over the training. The paper's: constant."""
    normaliser: Literal["tokens", "taught"] | None = None
    """What divides L_SDL's sum over tokens: N, the number of action tokens, as in L_GRPO (``tokens``, the paper's), or
    the number of tokens that have a teacher (``taught``). Default: the method's. With a share s of taught tokens,
    ``lambda_sdl`` under ``taught`` acts as lambda_sdl / s under ``tokens``."""
    imitation_weight: float | None = Field(None, ge=0)
    """Weight of the self-imitation term. Default: the method's. Has no effect in methods without that term."""
    estimator: Annotated[str, NameOrPath("estimator", ESTIMATORS)] = "iw_k3"
    """Estimator of the divergence in L_SDL: ``iw_k3`` (the paper's), ``iw_k1``, ``k1``, ``k2``, ``k3``,
    ``reverse_kl``, ``forward_kl``, or ``module:attribute`` for your own."""
    top_k: int | None = Field(None, ge=1)
    """For ``reverse_kl`` and ``forward_kl`` with a large vocabulary: use only the teacher's k most likely tokens, and
    one bucket for the rest. Default: the whole vocabulary."""
    clip_low: float = Field(0.2, ge=0)
    """The probability ratio is clipped at 1 - clip_low. Not given in the paper; 0.2 is second hand."""
    clip_high: float = Field(0.28, ge=0)
    """The probability ratio is clipped at 1 + clip_high. The paper's clip is asymmetric; 0.28 is second hand."""
    distil_clamp: float | None = Field(None, gt=0)
    """Not in the paper, off by default: tokens whose |log-ratio| is larger get no distillation gradient; counted."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling between sampler and learner: weight the policy term by min(probability ratio,
    this). Costs one scoring pass. Default: off. 2 is common when vLLM samples."""
    scale_by_std: bool = True
    """Divide the advantages by the standard deviation of the group's rewards."""
    terms: list[TermSection] = Field(default_factory=list)
    """Custom loss terms, added to the objective."""


class TeacherSection(Options):
    """The teacher's weights, and which groups it teaches."""

    sync_every: int = Field(1, ge=1)
    """Iterations between copies of the student's weights into a synchronised teacher. 1 needs no extra memory."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Share of its own weights that a synchronised teacher keeps at each sync (exponential moving average)."""
    min_reading: float | None = Field(None, gt=0, le=1)
    """Not in the paper, off by default: a sync is left out where the student's reading (section ``reading``), measured
    at each sync, is below this share of the first teacher's."""
    model: str | None = None
    """Name or folder of an external teacher, for methods with one. It must share the student's tokenizer."""
    max_group_reward: float | None = Field(None, ge=0, le=1)
    """Not in the paper, off by default: a group with a higher mean reward trains without a teacher."""


class ReadingSection(Options):
    """Whether the model reads the skill in its prompt: measured in training, and three ways to keep it up.

    Not in the paper. A teacher that follows the student can go deaf to its prompt (docs/method.md).
    """

    every: int = Field(10, ge=0)
    """Iterations between measurements of the teacher's reading: its success told its skill, minus told a wrong one. 0:
    never."""
    episodes: int = Field(16, ge=1)
    """Episodes per measurement told the skill, and as many told a wrong one. They are not trained on, but count towards
    the episode budget."""
    share: float = Field(0.0, ge=0, lt=1)
    """Share of each iteration's groups that have a skill in the student's own prompt, and are trained on their reward
    alone under it: they need reading, and keep it up."""
    source: Literal["practice", "bank"] = "practice"
    """The skills of those groups: of the environment's practice tasks, which can't be solved without reading
    (``practice``), or the bank's, for the tasks that come anyway (``bank``)."""
    replay: int = Field(0, ge=0)
    """Demonstrations of the warm start, with a skill in the prompt, that each iteration trains on again."""
    replay_weight: float = Field(0.1, gt=0)
    """Weight of their negative log-likelihood."""


class TrainingSection(Options):
    """Length of the training, and the optimiser."""

    iterations: int = Field(100, ge=0)
    """Number of iterations."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate. Not given in the paper; 1e-6 is common for all weights of a 4B model."""
    warmup_iterations: int = Field(0, ge=0)
    """Iterations of linear warm-up; after that the learning rate is constant."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps per pass over an iteration's groups."""
    epochs: int = Field(1, ge=1)
    """Passes over an iteration's groups."""
    ahead: Literal[0, 1] = 0
    """1: sample the next iteration's rollouts while an iteration is trained, with the weights from before it (one step
    off). Needs ``objective.importance_cap``. Not in the paper; docs/scale.md. Default: in turn."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """Maximum gradient norm; ``.inf`` disables clipping."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's beta1."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's beta2."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Maximum tokens per forward pass when scoring or training. Affects memory and speed, not the gradient. ``auto``:
    as many as fit into a GPU's free memory, at most 65536; 8192 on a CPU."""


class CurriculumSection(Options):
    """The training tasks and their order."""

    tasks: int | None = Field(None, ge=1)
    """Train on this many of the training tasks, evenly spaced by difficulty. Default: all."""
    easy_first: bool = False
    """Start with the easiest tasks and add harder ones over time (as in the paper's Sokoban)."""
    full_at: float = Field(0.5, gt=0, le=1)
    """With ``easy_first``: share of the training after which all tasks are included."""


class EvaluationSection(Options):
    """Evaluations during the training, on held-out tasks under the plain prompt."""

    split: str = "tune"
    """Split to evaluate on. Must not be the training split; keep ``test`` for the end."""
    every: int = Field(10, ge=0)
    """Iterations between evaluations. 0: only before the first and after the last iteration."""
    limit: int | None = Field(None, ge=1)
    """Evaluate on only this many tasks, evenly spaced by difficulty. Default: all."""
    samples: int = Field(1, ge=1)
    """Sampled episodes per task."""
    greedy: bool = False
    """Also run one greedy episode per task."""


class CheckpointSection(Options):
    """Checkpoints, for ``--resume`` and evaluation."""

    every: int = Field(10, ge=0)
    """Iterations between checkpoints. 0: only after the last iteration."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints to keep; older ones are deleted."""


class LogSection(Options):
    """Logs besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project (needs ``pip install wandb``). Default: off."""
    trackio: str | None = None
    """Trackio project (needs ``pip install trackio``). Default: off."""
    trajectories_every: int = Field(1, ge=0)
    """Write the trajectories of every n-th iteration. 0: none."""


def _engine_options(section: Any) -> EngineOptions:
    """Validate the section ``engine`` with the options class of the engine that it names."""
    if isinstance(section, EngineOptions):
        return section
    if not isinstance(section, Mapping):
        raise ValueError("expected keys and values of its own")
    try:
        return registry.options(section)  # a ValidationError passes through and keeps its locations
    except UserError as error:
        raise ValueError(str(error)) from error


def engine_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON schema of the section ``engine``: any registered engine's, or any keys for a ``module:Class``.

    Returns:
        The schema, and the definitions that it refers to, which belong at the root of the document.
    """
    kinds: list[dict[str, Any]] = [
        {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
    ]
    definitions: dict[str, Any] = {}
    for name in registry.names():
        kind = registry.options_class(name).model_json_schema()
        definitions |= kind.pop("$defs", {})
        kind["properties"]["name"] = {"const": name}
        if name != TorchOptions().name:
            kind["required"] = sorted({*kind.get("required", ()), "name"})
        kinds.append(kind)
    # An engine inside an engine (vLLM's learner) may be any of them again; its keys are not spelt out.
    if "EngineOptions" in definitions:
        definitions["EngineOptions"] = {"type": "object", "properties": {"name": {"type": "string"}}}
    return {"anyOf": kinds}, definitions


EngineSection = Annotated[
    EngineOptions,
    PlainValidator(_engine_options),
    PlainSerializer(lambda options: options.model_dump()),
    WithJsonSchema({"type": "object"}),
]


class RunConfig(Options):
    """One training run."""

    name: str
    """Name of the run; the default folder is ``runs/NAME-METHOD-seedN``."""
    method: str = "skill-sd"
    """A training method (`skillsd methods`)."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    model: ModelSection = ModelSection()
    engine: EngineSection = TorchOptions()
    environment: EnvironmentSection = EnvironmentSection()
    rollout: RolloutSection = RolloutSection()
    objective: ObjectiveSection = ObjectiveSection()
    teacher: TeacherSection = TeacherSection()
    reading: ReadingSection = ReadingSection()
    skills: SkillsSection = SkillsSection()
    summariser: SummariserSection = SummariserSection()
    training: TrainingSection = TrainingSection()
    curriculum: CurriculumSection = CurriculumSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @property
    def practice_groups(self) -> int:
        """Groups per iteration that are of practice tasks, in the place of ordinary ones."""
        return round(self.reading.share * self.rollout.tasks_per_iteration) if self.reading.source == "practice" else 0

    @property
    def measures_reading(self) -> bool:
        """Whether some episodes measure reading."""
        row = METHODS[self.method]
        gated = row.teacher == "synchronised" and self.teacher.min_reading is not None
        return row.teacher != "none" and row.context != "none" and (self.reading.every > 0 or gated)

    def episodes_after(self, iterations: int) -> int:
        """Maximum episodes in so many iterations, including those that measure uplift or reading."""
        measurements = 0
        if self.measures_reading:
            measurements = iterations // self.reading.every if self.reading.every else 0
            if METHODS[self.method].teacher == "synchronised" and self.teacher.min_reading is not None and iterations:
                syncs = (iterations - 1) // self.teacher.sync_every  # the first one, at the start, is not measured
                measurements += syncs + (syncs > 0)  # and once the first teacher's
        return iterations * self.episodes_per_iteration + 2 * self.reading.episodes * measurements

    @property
    def episodes_per_iteration(self) -> int:
        """Maximum episodes per iteration, including those that measure uplift, but not reading."""
        measured = METHODS[self.method].uses_skills and self.skills.credit == "uplift"
        return self.rollout.tasks_per_iteration * (
            self.rollout.group_size + (self.skills.uplift_episodes if measured else 0)
        )

    _fill_in_seed = model_validator(mode="before")(with_own_seed)

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
            raise ValueError("must be usable as a folder name")
        return name
