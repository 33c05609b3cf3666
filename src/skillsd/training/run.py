"""A run: everything that one training owns, put together from its configuration."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from skillsd.config import EngineSection, RunConfig, SummariserSection
from skillsd.endpoint import check_access
from skillsd.engines.base import Engine
from skillsd.envs import registry
from skillsd.envs.base import TaskSet, spread
from skillsd.errors import UserError
from skillsd.methods import Method, method
from skillsd.objective import Objective, scheduled
from skillsd.rollouts.episode import Actor, Budget
from skillsd.rollouts.tokens import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.skills import ucb
from skillsd.skills.background import BackgroundSummaries
from skillsd.skills.bank import SkillBank
from skillsd.skills.context import load_template
from skillsd.skills.endpoint import NAMES, EndpointSummariser
from skillsd.skills.policy import PolicySummariser
from skillsd.skills.prompt import SummaryPrompt, load_prompt
from skillsd.skills.summarise import RuleSummariser, Summariser
from skillsd.training.curriculum import Curriculum
from skillsd.training.imitation import BestSuccesses
from skillsd.types import TRAIN_SPLIT

if TYPE_CHECKING:
    from skillsd.engines.torch.models import LoraOptions

BANK = "skills.sqlite"
"""The bank's file in a run's folder."""

SEAM = 64
"""Tokens that a prompt may grow by beyond those of the context put into it: words join where it begins and ends."""


@dataclass
class Run:
    """The parts of a run and how far it is."""

    config: RunConfig
    method: Method
    folder: Path
    engine: Engine
    renderer: ChatRenderer
    task_set: TaskSet
    curriculum: Curriculum
    template: str
    bank: SkillBank
    summaries: BackgroundSummaries | None
    """None where the method has no use for skills."""
    best: BestSuccesses | None = None
    """What the student imitates of its own; None where it does not."""
    iteration: int = 0
    """Finished iterations."""
    totals: dict[str, float] = field(default_factory=lambda: {"episodes": 0, "sampled_tokens": 0, "seconds": 0.0})

    @property
    def budget(self) -> Budget:
        """Of an episode under the plain prompt."""
        return Budget.of(self.config.rollout, self.task_set, self.engine.max_length)

    @property
    def student(self) -> Actor:
        """The student as it samples for training."""
        return Actor(self.engine, self.renderer, self.config.rollout.temperature)

    @property
    def actor(self) -> Actor:
        """Who acts in the training rollouts."""
        return dataclasses.replace(self.student, weights=self.method.sampler)

    def objective(self) -> Objective:
        """The method's weights, the recipe's where it gives them, lambda as scheduled for this iteration."""
        options, row = self.config.objective, self.method
        # Beside a reward the weight is a matter of taste; where there is nothing else it is only the gradient's scale.
        lambda_sdl = _or(options.lambda_sdl, row.lambda_sdl) if row.reward_weight else row.lambda_sdl
        progress = self.iteration / max(1, self.config.training.iterations)
        return Objective(
            reward_weight=_or(options.reward_weight, row.reward_weight),
            lambda_sdl=0.0 if row.teacher == "none" else scheduled(lambda_sdl, options.lambda_schedule, progress),
            imitation_weight=0.0 if not row.imitation_weight else _or(options.imitation_weight, row.imitation_weight),
            estimator=options.estimator,
            top_k=options.top_k,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            distil_clamp=options.distil_clamp,
            importance_cap=options.importance_cap,
        )

    def learning_rate(self) -> float:
        options = self.config.training
        if self.iteration < options.warmup_iterations:
            return options.learning_rate * (self.iteration + 1) / options.warmup_iterations
        return options.learning_rate

    def close(self) -> None:
        self.bank.close()
        self.engine.close()


def make_engine(config: RunConfig) -> Engine:
    """The engine as the recipe wants it: the embedded one, with vLLM for its rollouts where asked for."""
    import torch

    from skillsd.engines.torch.engine import TorchEngine

    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    row, options = method(config.method), config.training
    # A teacher that takes the student's weights at the start of every iteration needs no weights of its own.
    every_time = config.teacher.sync_every == 1 and config.teacher.ema is None
    follows = row.teacher == "none" or (row.teacher == "synchronised" and every_time)
    torch.manual_seed(derive_seed(config.seed, "torch"))
    trainer = TorchEngine(
        config.model.name,
        dtype=config.model.dtype,
        device=config.model.device,
        lora=_lora(config),
        teacher_follows=follows,
        teacher_model=config.teacher.model if row.teacher == "external" else None,
        micro_batch_tokens=options.micro_batch_tokens,
        max_sessions=config.rollout.concurrency,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    if config.engine.name == "torch":
        return trainer
    from skillsd.engines.vllm.engine import VllmEngine, VllmOptions

    given = config.engine.model_dump(exclude={"name"}) | {"max_model_len": sampled_length(config)}
    return VllmEngine(trainer, VllmOptions(**given, max_requests=config.rollout.concurrency))


def sampled_length(config: RunConfig) -> int | None:
    """The most tokens of a sequence that vLLM has to sample: the recipe's figure, or what its episodes may take.

    None is as many as the model takes: what a policy is given to summarise is limited by nothing else.
    """
    if config.engine.max_model_len is not None:
        return config.engine.max_model_len
    if method(config.method).uses_skills and config.skills.summariser == "policy":
        return None
    return config.rollout.trajectory_tokens + config.skills.teacher_extra_tokens + SEAM


def _lora(config: RunConfig) -> LoraOptions | None:
    from skillsd.engines.torch.models import LoraOptions

    lora, adapter = config.model.lora, config.model.adapter
    if lora and adapter:
        raise UserError(
            f"model.adapter is {adapter!r}, which has a rank of its own, and model.lora is given too. Leave one out"
        )
    if adapter:
        return LoraOptions(adapter=adapter)
    return LoraOptions(lora.rank, lora.alpha, lora.target_modules) if lora else None


def build(config: RunConfig, folder: Path, *, engine: Engine | None = None, task_set: TaskSet | None = None) -> Run:
    """Put a run together; its bank lives in `folder`, which must exist.

    Args:
        engine, task_set: other than the recipe's (tests, embedding in other programs).

    Raises:
        UserError: for anything in the recipe that does not fit together.
    """
    row = method(config.method)
    check_config(config)
    task_set = task_set or registry.load(config.environment.name, config.environment.options)
    if config.rollout.step_seconds < task_set.slowest_call:
        raise UserError(
            f"rollout.step_seconds is {config.rollout.step_seconds:g}, but a call of {config.environment.name!r} may "
            f"take {task_set.slowest_call:g} s by its own deadlines (environment.options): raise it, or lower those"
        )
    held_out = {task.id for split in task_set.splits if split != TRAIN_SPLIT for task in task_set.tasks(split)}
    if both := sorted(held_out.intersection(task.id for task in task_set.tasks(TRAIN_SPLIT))):
        raise UserError(
            f"{len(both)} training tasks of {config.environment.name!r} are in an evaluation split too, e.g. "
            f"{both[0]!r}: what trains on them cannot be evaluated honestly; remove them from one of the splits"
        )
    if config.evaluation.split == TRAIN_SPLIT:
        raise UserError(f"evaluation.split is {TRAIN_SPLIT!r}; give a held-out one: {', '.join(task_set.splits)}")
    task_set.tasks(config.evaluation.split)  # an unknown split is told now, not after the first iterations
    train_tasks = task_set.tasks(TRAIN_SPLIT)
    if (asked := config.curriculum.tasks) and asked > len(train_tasks):
        raise UserError(f"curriculum.tasks is {asked}, but the environment has {len(train_tasks)} training tasks")
    curriculum = Curriculum(
        spread(train_tasks, asked),
        config.curriculum,
        per_iteration=config.rollout.tasks_per_iteration,
        iterations=config.training.iterations,
        seed=config.seed,
    )
    if row.context == "oracle" and not all(task_set.oracle(task) for task in task_set.tasks(TRAIN_SPLIT)):
        raise UserError(
            f"method {row.name!r} tells its teacher a reference solution, but the environment "
            f"{config.environment.name!r} has none for some of its training tasks"
        )
    template = load_template(config.skills.template)
    if row.uses_skills and config.skills.summariser == "openai":
        check_access(config.summariser, NAMES)
    engine = engine or make_engine(config)
    if config.rollout.trajectory_tokens > engine.max_length:
        raise UserError(
            f"rollout.trajectory_tokens is {config.rollout.trajectory_tokens}, but the model takes sequences of at "
            f"most {engine.max_length} tokens"
        )
    if config.objective.top_k is not None:
        try:
            engine.score_top_k([], config.objective.top_k)
        except ValueError as error:
            raise UserError(f"objective.top_k is {config.objective.top_k}: {error}") from error
    bank = SkillBank(
        folder / BANK,
        policy=ucb.policy(config.skills.pick, seed=derive_seed(config.seed, "bank")),
        forbidden=held_out,
        max_per_task=config.skills.max_per_task,
    )
    renderer = ChatRenderer(engine.tokenizer, engine.stop_tokens, config.model.chat_template_kwargs)
    summaries = None
    if row.uses_skills:
        counts: Counter[str] = Counter()
        summaries = BackgroundSummaries(
            _summariser(config, task_set, engine, renderer, counts),
            bank,
            max_chars=config.skills.max_chars,
            concurrency=config.skills.concurrency,
            timeout=config.skills.timeout_seconds,
            secrets=task_set.secrets,
            counts=counts,
        )
    run = Run(
        config=config,
        method=row,
        folder=folder,
        engine=engine,
        renderer=renderer,
        task_set=task_set,
        curriculum=curriculum,
        template=template,
        bank=bank,
        summaries=summaries,
        best=BestSuccesses() if row.imitation_weight else None,
    )
    run.objective()  # an unknown estimator is told now
    return run


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def check_config(config: RunConfig) -> None:
    """What the recipe asks for must fit together; whatever can be told without the model and the tasks.

    Raises:
        UserError: naming the key, what was given and why not.
    """

    def refuse(key: str, given: object, reason: str) -> None:
        raise UserError(f"{key} is {given!r}, but {reason}")

    row, teacher, skills = method(config.method), config.teacher, config.skills
    if config.training.minibatches > config.rollout.tasks_per_iteration:
        raise UserError(
            f"training.minibatches is {config.training.minibatches}, but an iteration collects "
            f"{config.rollout.tasks_per_iteration} groups (rollout.tasks_per_iteration), which are never split"
        )
    if row.teacher == "external" and teacher.model is None:
        refuse("teacher.model", None, f"method {row.name!r} has another model for a teacher: give its name or folder")
    if row.teacher in ("synchronised", "frozen") and teacher.model is not None:
        refuse("teacher.model", teacher.model, f"the teacher of method {row.name!r} is {row.teacher}, not external")
    if row.teacher in ("frozen", "external"):
        if teacher.ema is not None:
            refuse("teacher.ema", teacher.ema, f"the teacher of method {row.name!r} is not synchronised")
        if teacher.sync_every != 1:
            refuse("teacher.sync_every", teacher.sync_every, f"the teacher of method {row.name!r} is not synchronised")
    options = config.objective
    if options.reward_weight == 0 and not (row.lambda_sdl or row.imitation_weight):
        refuse("objective.reward_weight", 0, f"method {row.name!r} has nothing else to learn from")
    _check_lengths(config)
    load_template(skills.template)
    if not row.uses_skills:
        return
    if skills.hindsight and row.actor_is_told:
        refuse("skills.hindsight", True, f"method {row.name!r} tells the skill before the group is played")
    if skills.hindsight and not skills.deterministic:
        refuse("skills.hindsight", True, "skills.deterministic is false: a group's skills would not be ready in time")
    if skills.credit == "uplift" and row.actor_is_told:
        refuse("skills.credit", "uplift", f"method {row.name!r} plays no episodes without the skill to compare with")
    if skills.content == "shuffled" and config.rollout.tasks_per_iteration == 1:
        refuse("skills.content", "shuffled", "rollout.tasks_per_iteration is 1: there is no other task's skill")
    _check_summariser(config)


def _check_lengths(config: RunConfig) -> None:
    """A limit that the recipe gives vLLM must hold the longest sequence that it will be asked to sample."""
    row, skills, summariser = method(config.method), config.skills, config.summariser
    given = config.engine.max_model_len
    if config.engine.name != "vllm" or given is None:
        return
    needed = [(config.rollout.trajectory_tokens, "rollout.trajectory_tokens")]
    if row.student_prompt == "skill" or (row.uses_skills and skills.credit == "uplift"):
        most = config.rollout.trajectory_tokens + skills.teacher_extra_tokens + SEAM
        needed.append((most, f"rollout.trajectory_tokens + skills.teacher_extra_tokens + {SEAM}"))
    if row.uses_skills and skills.summariser == "policy":  # a token for each character: more than text takes
        most = summariser.max_input_chars + summariser.max_output_tokens + SEAM
        needed.append((most, f"summariser.max_input_chars + summariser.max_output_tokens + {SEAM}"))
    most, what = max(needed)
    if given < most:
        raise UserError(f"engine.max_model_len is {given}, but {most} tokens may be asked for ({what}): raise it")


def _check_summariser(config: RunConfig) -> None:
    skills, options = config.skills, config.summariser
    load_prompt(options.prompt)
    if skills.summariser == "openai" and options.model is None:
        raise UserError("skills.summariser is 'openai': give the model's name at the endpoint in summariser.model")
    if skills.summariser != "openai" and options.model is not None:
        raise UserError(
            f"summariser.model is {options.model!r}, but skills.summariser is {skills.summariser!r}: only 'openai' "
            "asks a model of that name"
        )
    if skills.summariser == "policy" and not skills.deterministic:
        raise UserError(
            "skills.summariser is 'policy', but skills.deterministic is false: the policy would go on writing while "
            "its weights change. Set skills.deterministic to true"
        )
    if skills.summariser == "openai" and options.requests_per_minute:
        queue = skills.concurrency * 60 / options.requests_per_minute
        if queue > skills.timeout_seconds:
            raise UserError(
                f"summariser.requests_per_minute is {options.requests_per_minute:g}: with skills.concurrency "
                f"{skills.concurrency} a summary may wait {queue:.0f} s for its turn, but skills.timeout_seconds is "
                f"{skills.timeout_seconds:g}. Lower the concurrency or raise the timeout"
            )


def _summariser(
    config: RunConfig, task_set: TaskSet, engine: Engine, renderer: ChatRenderer, counts: Counter[str]
) -> Summariser:
    options = config.summariser
    if config.skills.summariser == "rules":
        rules = task_set.summariser()
        if rules is None:
            raise UserError(
                f"skills.summariser is 'rules', but the environment {config.environment.name!r} brings no rule-based "
                "summariser; the others are 'openai' and 'policy'"
            )
        return RuleSummariser(rules)
    prompt = SummaryPrompt(
        load_prompt(options.prompt), max_chars=config.skills.max_chars, max_input_chars=options.max_input_chars
    )
    if config.skills.summariser == "openai":
        return EndpointSummariser(options, prompt, counts)
    return PolicySummariser(
        engine,
        renderer,
        prompt,
        max_output_tokens=options.max_output_tokens,
        temperature=_or(options.temperature, config.rollout.temperature),
        seed=config.seed,
        counts=counts,
    )


def comparable(config: RunConfig) -> RunConfig:
    """The configuration without what may change when a run is taken up again."""
    defaults = RunConfig(name=config.name)
    access = {name: getattr(defaults.summariser, name) for name in SummariserSection.ACCESS}
    training = config.training.model_copy(update={"iterations": defaults.training.iterations})
    return config.model_copy(
        update={
            "training": training,
            "engine": EngineSection(name=config.engine.name),
            "summariser": config.summariser.model_copy(update=access),
            "evaluation": defaults.evaluation,
            "checkpoint": defaults.checkpoint,
            "log": defaults.log,
        }
    )


def actor_at(run: Run, temperature: float) -> Actor:
    """The student at another temperature (0: greedy)."""
    return dataclasses.replace(run.student, temperature=temperature)
