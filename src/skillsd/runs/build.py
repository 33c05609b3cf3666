"""Build a run from its configuration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from skillsd.config import RunConfig
from skillsd.engines.base import Engine
from skillsd.engines.endpoint import check_access
from skillsd.envs import registry
from skillsd.envs.base import TaskSet, evenly_spaced
from skillsd.envs.checked import checked
from skillsd.errors import UserError
from skillsd.methods import method
from skillsd.prompting.renderer import ChatRenderer
from skillsd.prompting.templates import load_template
from skillsd.runs.checks import check_config, engine_spec
from skillsd.seeds import derive_seed
from skillsd.skills import ucb
from skillsd.skills.background import BackgroundSummaries
from skillsd.skills.bank import Bank
from skillsd.skills.endpoint_summariser import NAMES, EndpointSummariser
from skillsd.skills.policy_summariser import PolicySummariser
from skillsd.skills.summarise import RuleSummariser, Summariser, load_summariser
from skillsd.skills.summary_prompt import SummaryPrompt, load_prompt
from skillsd.training.curriculum import Curriculum
from skillsd.training.imitation import BestSuccesses
from skillsd.training.run import Run
from skillsd.types import TRAIN_SPLIT

BANK = "skills.sqlite"
"""The bank's file in a run's folder."""


def make_engine(config: RunConfig) -> Engine:
    """The recipe's engine, with its model loaded."""
    return config.engine.build(engine_spec(config))


def load_task_set(config: RunConfig) -> TaskSet:
    """The recipe's task set."""
    return registry.load(config.environment.name, config.environment.options)


def build(config: RunConfig, folder: Path, *, engine: Engine | None = None, task_set: TaskSet | None = None) -> Run:
    """Build a run. Its bank is opened in `folder`, which must exist.

    Args:
        engine, task_set: used instead of the recipe's (for tests, or for embedding in other programs).

    Raises:
        UserError: for settings that do not fit together, or do not fit the model or the tasks.
    """
    row = method(config.method)
    check_config(config)
    task_set = checked(task_set or load_task_set(config))
    held_out = _check_tasks(config, task_set)
    task_set.check_machine()
    curriculum = Curriculum(
        evenly_spaced(task_set.tasks(TRAIN_SPLIT), config.curriculum.tasks),
        config.curriculum,
        per_iteration=config.rollout.tasks_per_iteration - config.practice_groups,
        iterations=config.training.iterations,
        seed=config.seed,
    )
    template = load_template(config.skills.template)
    if row.uses_skills and config.skills.summariser == "openai":
        check_access(config.summariser, NAMES)
    engine = engine or make_engine(config)
    if config.rollout.trajectory_tokens > engine.max_length:
        raise UserError(
            f"rollout.trajectory_tokens is {config.rollout.trajectory_tokens}, but the model takes sequences of at "
            f"most {engine.max_length} tokens: set rollout.trajectory_tokens={engine.max_length}, or less"
        )
    bank = Bank(
        folder / BANK,
        rule=ucb.picking_rule(config.skills.pick, seed=derive_seed(config.seed, "bank")),
        held_out=held_out,
        max_per_task=config.skills.max_per_task,
    )
    template_kwargs, place = config.model.chat_template_kwargs, config.skills.place
    renderer = ChatRenderer(engine.tokenizer, engine.stop_tokens, template_kwargs, place=place, tools=task_set.tools)
    summaries = None
    if row.uses_skills:
        counts: Counter[str] = Counter()
        summaries = BackgroundSummaries(
            _summariser(config, task_set, engine, counts),
            bank,
            max_chars=config.skills.max_chars,
            concurrency=config.skills.concurrency,
            timeout=config.skills.timeout_seconds,
            secrets=task_set.secrets,
            counts=counts,
        )
    return Run(
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


def _check_tasks(config: RunConfig, task_set: TaskSet) -> set[str]:
    """Check the tasks against the recipe; returns the ids of all held-out tasks."""
    name = config.environment.name
    if config.rollout.step_seconds < task_set.slowest_call:
        raise UserError(
            f"rollout.step_seconds is {config.rollout.step_seconds:g}, but a call of {name!r} may take "
            f"{task_set.slowest_call:g} s by its own deadlines (environment.options): raise it, or lower those"
        )
    held_out = {task.id for split in task_set.splits if split != TRAIN_SPLIT for task in task_set.tasks(split)}
    train = task_set.tasks(TRAIN_SPLIT)
    if both := sorted(held_out.intersection(task.id for task in train)):
        raise UserError(
            f"{len(both)} training tasks of {name!r} are also in an evaluation split, e.g. {both[0]!r}: training on "
            "them would invalidate the evaluation; remove them from one of the splits"
        )
    if config.evaluation.split == TRAIN_SPLIT:
        others = ", ".join(split for split in task_set.splits if split != TRAIN_SPLIT)
        raise UserError(f"evaluation.split is {TRAIN_SPLIT!r}; give a held-out split: {others}")
    # An unknown split is reported now, not after the first iterations.
    registry.tasks_of(task_set, config.evaluation.split, "evaluation.split")
    if (wanted := config.curriculum.tasks) and wanted > len(train):
        raise UserError(f"curriculum.tasks is {wanted}, but the environment has {len(train)} training tasks")
    if method(config.method).context == "oracle" and not all(task_set.oracle(task) for task in train):
        raise UserError(
            f"method {config.method!r} puts a reference solution into the teacher's prompt, but the environment "
            f"{name!r} has none for some of its training tasks: choose another method or environment"
        )
    if config.practice_groups:
        task_set.practice(seed=0)
    if config.reading.replay:
        next(task_set.demonstrations(TRAIN_SPLIT, seed=0))
    if method(config.method).uses_skills:
        for task in train:
            task_set.secrets(task)  # a fault shows now, not in every summary
    return held_out


def _summariser(config: RunConfig, task_set: TaskSet, engine: Engine, counts: Counter[str]) -> Summariser:
    options, name = config.summariser, config.skills.summariser
    if ":" in name:
        return load_summariser(name, options.options)
    if name == "rules":
        rules = task_set.summariser()
        if rules is None:
            raise UserError(
                f"skills.summariser is 'rules', but the environment {config.environment.name!r} has no rule-based "
                "summariser; use 'openai', 'policy', or your own as module:Class (docs/summarisers.md)"
            )
        return RuleSummariser(rules)
    prompt = SummaryPrompt(
        load_prompt(options.prompt), max_chars=config.skills.max_chars, max_input_chars=options.max_input_chars
    )
    if name == "openai":
        return EndpointSummariser(options, prompt, counts)
    temperature = config.rollout.temperature if options.temperature is None else options.temperature
    return PolicySummariser(
        engine,
        ChatRenderer(engine.tokenizer, engine.stop_tokens, config.model.chat_template_kwargs),  # without tools
        prompt,
        max_output_tokens=options.max_output_tokens,
        temperature=temperature,
        seed=config.seed,
        counts=counts,
    )
