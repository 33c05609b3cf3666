"""A run is one readable file. These are its keys, their vetted defaults and what they mean.

A recipe is YAML; any key can be overridden on the command line (``training.learning_rate=1e-4``). Whatever is wrong is
told in one line that names the key, what was given and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from skillsd.errors import UserError, unknown_name
from skillsd.methods import METHODS

RECIPES = Path(__file__).parent / "recipes"


def _json_able(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                f"{name!r} has to be JSON, which has no such value: write a date, say, in quotes"
            ) from None
    return values


JsonObject = Annotated[dict[str, Any], AfterValidator(_json_able)]
"""Values that JSON has too: YAML knows more, dates for one."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSection(_Section):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    target_modules: str | list[str] = "all-linear"


class ModelSection(_Section):
    name: str = "nano"
    """A model by name (``nano`` is shipped, ``smollm2-135m`` fetched by pip), a local folder, or a hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch. None leaves torch's own choice. Results are the same bits only at the same number."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights."""
    adapter: str | None = None
    """A folder with an adapter for the model, as peft writes it: train that one on, instead of ``lora``."""
    gradient_checkpointing: bool = False
    chat_template_kwargs: JsonObject = {}
    """Given to the tokenizer's chat template, e.g. ``{enable_thinking: false}``. docs/models.md."""


class EngineSection(_Section):
    """Who samples the rollouts. The embedded engine trains in any case. docs/vllm.md."""

    name: Literal["torch", "vllm"] = "torch"
    """``vllm`` runs in a process of its own. The keys below are for it alone."""
    python: str | None = None
    """Path of the interpreter that has vLLM (``build/vllm/bin/python`` after `make vllm-env`). None is this one."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes for good; the training needs the rest."""
    cpu_kv_cache_gib: int = Field(1, ge=1)
    """Memory for keys and values where vLLM runs on a CPU."""
    max_model_len: int | None = Field(None, ge=2)
    """The most tokens of a sequence that is sampled. None is what the recipe's episodes may take. docs/vllm.md."""
    timeout_seconds: float = Field(600.0, gt=0)
    """The longest that vLLM may take to start, to load weights, or to answer one request."""
    options: dict[str, Any] = {}
    """More keyword arguments of ``vllm.LLM``, e.g. ``{tensor_parallel_size: 2}``."""


class EnvironmentSection(_Section):
    name: str = "sokoban"
    """A registered environment (`skillsd envs list`), or ``module:Class``."""
    options: dict[str, Any] = {}
    """Given to the environment's task set as keyword arguments."""


class RolloutSection(_Section):
    tasks_per_iteration: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    """G: episodes of one task. The paper does not give it."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling distribution. Log-probs for the loss are taken at the same temperature."""
    turn_tokens: int = Field(256, ge=1)
    """The most tokens the student may sample in one turn."""
    trajectory_tokens: int = Field(4096, ge=2)
    """The most tokens of a whole trajectory, prompt included."""
    step_seconds: float = Field(60.0, gt=0)
    """Deadline of one call to the environment."""
    retries: int = Field(2, ge=0)
    """Fresh tries of an episode that the infrastructure broke; after that its group is dropped."""
    concurrency: int = Field(256, ge=1)
    """The most episodes under way at once."""


class ObjectiveSection(_Section):
    reward_weight: float | None = Field(None, ge=0)
    """None takes the method's."""
    lambda_sdl: float | None = Field(None, ge=0)
    """Weight of the distillation beside the reward; None takes the method's (the paper's 0.001). Ignored without a
    teacher, and in methods that are distillation alone (OPD, OPSD): their weight is 1."""
    lambda_schedule: Literal["constant", "linear_decay", "cosine"] = "constant"
    imitation_weight: float | None = Field(None, ge=0)
    """Weight of the self-imitation; None takes the method's. Ignored by a method without it."""
    estimator: Literal["iw_k3", "iw_k1", "k1", "k2", "k3", "reverse_kl", "forward_kl"] = "iw_k3"
    """How the divergence is estimated (`skillsd.objective.ESTIMATORS`); ``iw_k3`` is the paper's."""
    top_k: int | None = Field(None, ge=1)
    """For ``reverse_kl`` and ``forward_kl`` with a large vocabulary: the teacher's k most likely tokens, and one bucket
    for the rest. None takes the whole vocabulary."""
    clip_low: float = Field(0.2, ge=0)
    """Not given in the paper; 0.2 is the field's habit."""
    clip_high: float = Field(0.2, ge=0)
    distil_clamp: float | None = Field(None, gt=0)
    """A change of method, off by default: tokens with a larger |l| give no distillation gradient, and are counted."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling between sampler and trainer: the policy term is weighted by min(ratio of their
    log-probs, this). Costs one pass of scoring. None is off; 2 is usual where vLLM samples."""
    scale_by_std: bool = True
    """Divide the group's advantages by their standard deviation."""


class TeacherSection(_Section):
    sync_every: int = Field(1, ge=1)
    """A synchronised teacher takes the student's weights every so many iterations; 1 needs no copy of the weights."""
    ema: float | None = Field(None, gt=0, lt=1)
    """A synchronised teacher keeps this share of its own weights each time: an exponential moving average."""
    model: str | None = None
    """An external teacher: a model's name or folder, with the student's tokenizer. Only for methods with one."""
    max_group_reward: float | None = Field(None, ge=0, le=1)
    """A change of method, off by default: a group whose mean reward is above it gets no teacher."""


class SkillsSection(_Section):
    summariser: Literal["rules", "openai", "policy"] = "rules"
    """Who writes the skills. ``rules``: the environment's own, without a language model; ``openai``: any endpoint that
    speaks OpenAI's chat completions; ``policy``: the student itself. The section ``summariser`` is for the last two."""
    sources: Literal["all", "successes", "failures"] = "all"
    """Which trajectories are summarised. The paper's: all."""
    hindsight: bool = False
    """Summarise a group before its own update, so that its skills may teach it; the paper's teach later visits."""
    content: Literal["own", "shuffled", "empty"] = "own"
    """What the teacher is told where it would be told a skill: that one, another task's (``shuffled``), or nothing.
    The last two ask whether what a skill *says* matters."""
    credit: Literal["reward", "source", "uplift"] = "reward"
    """What a skill earns when it was used: the rewards of the rollouts it taught (the paper's), the reward of the
    trajectory it was written from, or its measured uplift, which costs `uplift_episodes`."""
    uplift_episodes: int = Field(4, ge=1)
    """Episodes with the skill in the student's prompt by which its uplift is measured; nothing is trained on them, but
    they count as episodes."""
    pick: Literal["ucb", "random", "last", "best"] = "ucb"
    """``last`` is no bank at all: the newest skill only. ``best`` is UCB without exploration: the highest mean reward,
    for a skill never used its source's."""
    ucb_c: float = Field(1.0, ge=0)
    """Exploration constant c of UCB. Not given in the paper; 1 suits rewards in [0, 1]."""
    max_per_task: int | None = Field(None, ge=1)
    """The most skills kept of a task (those never tried apart); None keeps all."""
    template: str = "teacher"
    """How a skill is worded in the teacher's prompt: a template of the package, or a path to one.

    The paper's prompts are not given; these are ours."""
    teacher_extra_tokens: int = Field(512, ge=1)
    """The most tokens a skill may add to the teacher's prompt. One that does not fit is counted and skipped."""
    max_chars: int = Field(4000, ge=1)
    """A longer skill is refused when it is written."""
    deterministic: bool = True
    """Wait for all summaries at the iteration's end. False: what is not ready serves a later iteration."""
    concurrency: int = Field(16, ge=1)
    """The most summaries that are written at once."""
    timeout_seconds: float = Field(120.0, gt=0)
    """What one summary may take in all: repeated requests and the rests between them count."""


class EndpointSection(_Section):
    """A language model behind an endpoint that speaks OpenAI's chat completions, and what it may cost."""

    model: str | None = None
    """Its name at the endpoint."""
    base_url: str | None = None
    """The endpoint's address, as a rule with ``/v1`` at its end. None is OpenAI's own."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written anywhere. None is
    ``OPENAI_API_KEY`` for OpenAI's own address, and no key for another ``base_url``."""
    request: JsonObject = {}
    """More fields of the endpoint's requests (``seed``, ``reasoning_effort``, ``chat_template_kwargs`` ...)."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Deadline of one request."""
    max_retries: int = Field(4, ge=0)
    """How often a request is repeated after 408, 409, 429, 5xx, a missed deadline or a broken connection."""
    requests_per_minute: float | None = Field(None, gt=0)
    budget_calls: int | None = Field(None, ge=0)
    """After so many requests in all no more are made. None is no limit."""
    budget_tokens: int | None = Field(None, ge=0)
    """After so many tokens, prompts and answers together, no more requests are made; those under way are finished."""
    price_in: float | None = Field(None, ge=0)
    """Of a million tokens of prompts, in any currency; for the figures."""
    price_out: float | None = Field(None, ge=0)
    """Of a million tokens of answers."""

    ACCESS: ClassVar = (
        *("base_url", "api_key_env", "timeout_seconds", "max_retries", "requests_per_minute"),
        *("budget_calls", "budget_tokens", "price_in", "price_out"),
    )
    """What decides how the model is reached and paid, not what it says: may change when work is taken up again."""

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """In the currency of the prices; None if there are none. A price that is not given is 0."""
        if self.price_in is None and self.price_out is None:
            return None
        return (tokens_in * (self.price_in or 0) + tokens_out * (self.price_out or 0)) / 1e6

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variables_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("expected the name of an environment variable, not the key itself")
        return name

    @field_validator("base_url")
    @classmethod
    def _is_an_address_without_secrets(cls, address: str | None) -> str | None:
        if address is None:
            return None
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query:
            raise ValueError("it would be written down: give the name of the key's environment variable instead")
        try:
            _ = parts.port  # read when it is asked for
        except ValueError:
            raise ValueError("its port has to be a number up to 65535, as in http://localhost:8000/v1") from None
        return address


class SummariserSection(EndpointSection):
    """A language model that writes skills, for ``skills.summariser`` ``openai`` and ``policy``. docs/summarisers.md.

    The policy has neither a model's name nor anything else of an endpoint's.
    """

    prompt: str = "summarise"
    """What it is asked: a template of the package, or a path to one. The paper's is not given; this is ours."""
    temperature: float | None = Field(None, ge=0)
    """None takes the endpoint's own; the policy's is then ``rollout.temperature``."""
    max_input_chars: int = Field(24_000, ge=1000)
    """A longer prompt is condensed (`skillsd.skills.prompt`). The policy's has to fit the model's context besides."""
    max_output_tokens: int = Field(1024, ge=1)
    """The most tokens of an answer, a reasoning model's thoughts included."""


class TrainingSection(_Section):
    iterations: int = Field(100, ge=0)
    learning_rate: float = Field(1e-6, gt=0)
    """Not given in the paper; 1e-6 is the field's habit for full weights of this size."""
    warmup_iterations: int = Field(0, ge=0)
    minibatches: int = Field(1, ge=1)
    """Optimiser steps per epoch over the collected groups."""
    epochs: int = Field(1, ge=1)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """``.inf`` does not clip."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    micro_batch_tokens: int = Field(8192, ge=1)
    """Tokens in one forward pass. Does not change the gradient, only memory and speed."""


class CurriculumSection(_Section):
    tasks: int | None = Field(None, ge=1)
    """Train on so many of the environment's training tasks only, evenly spread from easy to hard. None takes all."""
    easy_first: bool = False
    """Begin with the easiest tasks and let harder ones in as training goes on (the paper's Sokoban)."""
    full_at: float = Field(0.5, gt=0, le=1)
    """Share of the training after which every task is in."""


class EvaluationSection(_Section):
    split: str = "tune"
    """Split that the learning curve is measured on. Never a training split; keep ``test`` for the end."""
    every: int = Field(10, ge=0)
    """Iterations between evaluations; 0 evaluates only before the first and after the last one."""
    limit: int | None = Field(None, ge=1)
    """Only so many tasks, evenly spread from easy to hard."""
    samples: int = Field(1, ge=1)
    """Sampled episodes per task."""
    greedy: bool = False
    """Also play each task once greedily."""


class CheckpointSection(_Section):
    every: int = Field(10, ge=0)
    """Iterations between checkpoints; 0 writes only the last one."""
    keep: int = Field(2, ge=1)
    """Older ones are deleted."""


class LogSection(_Section):
    tensorboard: bool = True
    wandb: str | None = None
    """Project name of Weights & Biases (needs the extra ``wandb``)."""
    trajectories_every: int = Field(1, ge=0)
    """Iterations between those whose trajectories are kept as JSON lines; 0 keeps none."""


class RunConfig(_Section):
    """One training run."""

    name: str
    method: str = "skill-sd"
    seed: int = Field(0, ge=0)
    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
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
        """The most episodes that an iteration plays, those that measure uplift included."""
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


class ArchitectureSection(_Section):
    """A new Llama-type decoder."""

    hidden_size: int = Field(96, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    intermediate_size: int = Field(256, ge=8)
    max_length: int = Field(512, ge=16)
    vocabulary: int = Field(1024, ge=300)
    """The most tokens of the new tokenizer, a byte-level BPE learnt on demonstrations."""


class WarmStartSection(_Section):
    steps: int = Field(1000, ge=1)
    batch: int = Field(64, ge=1)
    """Demonstrations a step."""
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    """Then the learning rate falls along a cosine to a tenth."""
    beta2: float = Field(0.98, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    observation_weight: float = Field(0.2, ge=0)
    """Weight of the environment's tokens; action tokens weigh 1, the prompt 0."""
    micro_batch_tokens: int = Field(16384, ge=1)
    demonstrations: dict[str, Any] = {}
    """Options of the environment's demonstrations."""
    template: str = "teacher"
    """How a demonstration's skill is worded in its prompt; must be the run's later ``skills.template``."""


class CheckSection(_Section):
    """What is played after a warm start: is it worth reinforcement learning? docs/models.md."""

    split: str = "tune"
    """Never a training split; keep ``test`` for the end."""
    limit: int | None = Field(None, ge=1)
    """Only so many tasks, evenly spread from easy to hard."""
    samples: int = Field(2, ge=1)
    """Sampled episodes per task and prompt; one more is played greedily."""
    turn_tokens: int = Field(64, ge=1)
    """The most tokens of a turn."""
    concurrency: int = Field(256, ge=1)
    """The most episodes under way at once."""


class SftConfig(_Section):
    """One warm start: supervised training on an environment's demonstrations."""

    name: str
    seed: int = Field(0, ge=0)
    model: ModelSection = ModelSection()
    new: ArchitectureSection | None = None
    """Make a new model and tokenizer instead of loading ``model.name``."""
    environment: EnvironmentSection = EnvironmentSection()
    warm_start: WarmStartSection = WarmStartSection()
    check: CheckSection = CheckSection()


C = TypeVar("C", RunConfig, SftConfig, EndpointSection)
_COMMANDS: dict[type[BaseModel], str] = {RunConfig: "skillsd train", SftConfig: "skillsd sft"}


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(kind: type[C], recipe: str, overrides: Iterable[str] = ()) -> C:
    """The configuration of a recipe (a name of the package's, or a path) with ``key=value`` overrides.

    Raises:
        UserError: for an unknown recipe, unreadable YAML, or any key or value that does not fit.
    """
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe).expanduser()
    if path.is_dir():
        raise UserError(f"{recipe!r} is a folder; a recipe is a YAML file, or one of: {', '.join(recipes())}")
    if not path.is_file():
        if "/" in recipe or path.suffix:
            raise UserError(f"there is no recipe file {recipe!r}; recipes of the package: {', '.join(recipes())}")
        raise unknown_name("recipe", recipe, recipes())
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {str(path)!r} is not readable YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"the recipe {str(path)!r} can't be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise UserError(f"the recipe {str(path)!r} holds {type(data).__name__}, expected keys and values")
    other = SftConfig if kind is RunConfig else RunConfig
    if any(key in other.model_fields and key not in kind.model_fields for key in data):
        raise UserError(f"recipe {recipe!r} is one for `{_COMMANDS[other]}`, not for `{_COMMANDS[kind]}`")
    for override in overrides:
        _override(data, override)
    return build(kind, data, where=f"recipe {recipe!r}")


def build(kind: type[C], data: Mapping[str, Any], *, where: str) -> C:
    """Validate; every problem in one message, a line each."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # A value that fits none of several types is one problem, however many types there are.
        problems = {tuple(_location(kind, problem["loc"])): dict(problem) for problem in reversed(error.errors())}
        lines = [f"{where}: {_explain(kind, problem)}" for problem in reversed(problems.values())]
        raise UserError("\n".join(lines)) from error


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML; `load` reads it back to the same."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""A number, though YAML 1.1 takes 1e-4 for a string."""


_MAY_HOLD_A_KEY = ("api_key_env", "base_url")
"""Where someone may put a key by mistake: it is not repeated in the error."""


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is no override: write key=value, e.g. training.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {override!r} is not readable as YAML") from error
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    *parents, leaf = key.split(".")
    here = data
    for part in parents:
        inner = here.get(part)
        if inner is None:
            inner = here[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {part!r} is a value, not a section")
        here = inner
    here[leaf] = value


def _explain(kind: type[BaseModel], problem: dict[str, Any]) -> str:
    location = _location(kind, problem["loc"])
    key = ".".join(location)
    if problem["type"] == "invalid_key":
        return f"the key {problem['input']!r}{f' of {key}' if key else ''} is no name"
    if problem["type"] == "extra_forbidden":
        known = _keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        # The name may be right and only its section wrong.
        elsewhere = [path for path in _all_keys(kind) if path.split(".")[-1] == location[-1]]
        prefix = ".".join(location[:-1])
        if elsewhere:
            hint = f" Did you mean {elsewhere[0]!r}?"
        elif near:
            hint = f" Did you mean {'.'.join(filter(None, [prefix, near[0]]))!r}?"
        else:
            hint = ""
        return f"unknown key {key!r}.{hint} Known here: {', '.join(sorted(known))}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} is {problem['input']!r}, expected keys and values of its own"
    message = problem["msg"].removeprefix("Value error, ")
    given = "not usable" if key.split(".")[-1] in _MAY_HOLD_A_KEY else repr(problem["input"])
    return f"{key} is {given}: {message[0].lower()}{message[1:]}"


def _location(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the sections and the key, without what pydantic adds below (a place in a list, one type of several)."""
    names: list[str] = []
    for part in path:
        if isinstance(part, int):
            break
        names.append(part)
        section = _section(kind, part)
        if section is None:
            break
        kind = section
    return names


def _keys(kind: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        section = _section(kind, part)
        if section is None:
            return []
        kind = section
    return list(kind.model_fields)


def _section(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = kind.model_fields.get(name)
    if field is None:
        return None
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _all_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in kind.model_fields:
        section = _section(kind, name)
        found += _all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return found
