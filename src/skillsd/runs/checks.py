"""Checks that a recipe's settings fit together and fit the engine, and the recipe's requirements on the engine."""

from __future__ import annotations

from pathlib import Path

import yaml

from skillsd.config import RunConfig
from skillsd.config.skills import SummariserSection
from skillsd.engines.estimate import Workload
from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.errors import UserError
from skillsd.methods import method
from skillsd.prompting.templates import load_template
from skillsd.runs.trial import try_objective, try_rule
from skillsd.seeds import derive_seed
from skillsd.skills import ucb
from skillsd.skills.summarise import find_summariser
from skillsd.skills.summary_prompt import load_prompt
from skillsd.training.run import Run, has_own_teacher, objective_of

PROMPT_MARGIN_TOKENS = 64
"""A context may lengthen a prompt by a few tokens more than its own, since tokens merge differently at its edges."""


def check_config(config: RunConfig) -> None:
    """Check everything that does not depend on the model and the tasks.

    Raises:
        UserError: with the key, the given value, and why it does not fit.
    """

    def refuse(key: str, given: object, reason: str) -> None:
        raise UserError(f"{key} is {given!r}, but {reason}")

    row, teacher, skills = method(config.method), config.teacher, config.skills
    if config.training.minibatches > config.rollout.tasks_per_iteration:
        raise UserError(
            f"training.minibatches is {config.training.minibatches}, but an iteration has only "
            f"{config.rollout.tasks_per_iteration} groups (rollout.tasks_per_iteration), and groups are not split"
        )
    if config.training.ahead:
        _check_ahead(config)
    if row.teacher == "external" and teacher.model is None:
        refuse("teacher.model", None, f"the teacher of method {row.name!r} is another model: give its name or folder")
    if row.teacher in ("synchronised", "frozen") and teacher.model is not None:
        refuse("teacher.model", teacher.model, f"the teacher of method {row.name!r} is {row.teacher}, not external")
    if row.teacher in ("frozen", "external"):
        if teacher.ema is not None:
            refuse("teacher.ema", teacher.ema, f"the teacher of method {row.name!r} is not synchronised")
        if teacher.sync_every != 1:
            refuse("teacher.sync_every", teacher.sync_every, f"the teacher of method {row.name!r} is not synchronised")
        if teacher.min_reading is not None:
            refuse(
                "teacher.min_reading", teacher.min_reading, f"the teacher of method {row.name!r} is not synchronised"
            )
    _check_reading(config)
    options = config.objective
    if options.reward_weight == 0 and not (row.lambda_sdl or row.imitation_weight):
        refuse("objective.reward_weight", 0, f"method {row.name!r} has nothing else to learn from")
    objective = objective_of(config, row)
    if options.terms or ":" in options.estimator:
        try_objective(objective)
    config.engine.check(engine_spec(config))
    load_template(skills.template)
    if not row.uses_skills:
        return
    if skills.hindsight and row.sampler_sees_context:
        refuse("skills.hindsight", True, f"method {row.name!r} needs the skill before the group is played")
    if skills.hindsight and not skills.deterministic:
        refuse("skills.hindsight", True, "skills.deterministic is false: a group's skills would not be ready in time")
    if skills.credit == "uplift" and row.sampler_sees_context:
        refuse("skills.credit", "uplift", f"method {row.name!r} plays no episodes without the skill to compare with")
    if skills.content == "shuffled" and config.rollout.tasks_per_iteration == 1:
        refuse("skills.content", "shuffled", "rollout.tasks_per_iteration is 1: there is no other task's skill")
    rule = ucb.picking_rule(skills.pick)
    if ":" in skills.pick:
        try_rule(rule, skills.ucb_c)
    _check_summariser(config)


def _check_reading(config: RunConfig) -> None:
    row, options = method(config.method), config.reading
    if options.share:
        if row.sampler_sees_context:
            raise UserError(
                f"reading.share is {options.share:g}, but with method {row.name!r} the sampling policy's prompt has a "
                "context in every group"
            )
        if options.source == "bank" and row.context == "none":
            raise UserError(f"reading.source is 'bank', but method {row.name!r} has no skills: set it to 'practice'")
        groups = round(options.share * config.rollout.tasks_per_iteration)
        if not 0 < groups < config.rollout.tasks_per_iteration:
            raise UserError(
                f"reading.share is {options.share:g}: {groups} of {config.rollout.tasks_per_iteration} groups "
                "(rollout.tasks_per_iteration); expected at least one, and not all of them"
            )
    if options.replay and row.imitation_weight:
        raise UserError(
            f"reading.replay is {options.replay}, but method {row.name!r} imitates successes with the same loss term: "
            "use one of them"
        )


def _check_ahead(config: RunConfig) -> None:
    row = method(config.method)
    if config.objective.importance_cap is None:
        raise UserError(
            "training.ahead is 1, but objective.importance_cap is not set: rollouts of earlier weights need importance "
            "weights. Set objective.importance_cap=2"
        )
    if config.reading.share:
        raise UserError(
            f"training.ahead is 1, but reading.share is {config.reading.share:g}: those groups have a skill in their "
            "prompt, which is selected after the update. Set one of them to 0"
        )
    if row.sampler == "teacher" or row.sampler_sees_context:
        raise UserError(
            f"training.ahead is 1, but with method {row.name!r} rollouts depend on the iteration before: they are "
            f"sampled {'from the teacher' if row.sampler == 'teacher' else 'with a skill in the prompt'}. Set "
            "training.ahead=0"
        )


def _check_summariser(config: RunConfig) -> None:
    skills, options = config.skills, config.summariser
    load_prompt(options.prompt)
    if skills.summariser == "openai" and options.model is None:
        raise UserError("skills.summariser is 'openai': give the model's name in summariser.model")
    if skills.summariser != "openai" and options.model is not None:
        raise UserError(
            f"summariser.model is {options.model!r}, but skills.summariser is {skills.summariser!r}: only 'openai' "
            "uses it"
        )
    if ":" in skills.summariser:
        find_summariser(skills.summariser)
    elif options.options:
        raise UserError(
            f"summariser.options is {options.options}, but skills.summariser is {skills.summariser!r}: they are for "
            "your own summariser, module:Class"
        )
    if skills.summariser == "policy" and not skills.deterministic:
        raise UserError(
            "skills.summariser is 'policy', but skills.deterministic is false: the policy can't write summaries while "
            "its weights change. Set skills.deterministic to true"
        )
    if skills.summariser == "openai" and options.requests_per_minute:
        queue = skills.concurrency * 60 / options.requests_per_minute
        if queue > skills.timeout_seconds:
            raise UserError(
                f"summariser.requests_per_minute is {options.requests_per_minute:g}: with skills.concurrency "
                f"{skills.concurrency} a summary may wait {queue:.0f} s, but skills.timeout_seconds is "
                f"{skills.timeout_seconds:g}. Lower the concurrency or raise the timeout"
            )


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Check that a recipe can be trained in this number of ranks, on this machine.

    Args:
        ranks: 1 for an ordinary process.

    Raises:
        UserError: naming the number or setting to change.
    """
    learner = config.engine.for_learner()
    shard = getattr(learner, "shard", None)
    key = "engine.shard" if learner is config.engine else "engine.learner.shard"
    if ranks == 1:
        if shard not in (None, "none"):
            raise UserError(
                f"{key} is {shard!r}, which divides the training among several ranks, but this is one process: add "
                f"--gpus N, or set {key}=none"
            )
        return
    if shard is None:
        raise UserError(
            f"{ranks} ranks were asked for (--gpus), but the engine {learner.name!r} trains in one process: leave "
            "--gpus out, or use the engine 'torch'"
        )
    if shard == "none":
        raise UserError(
            f"{ranks} ranks were asked for (--gpus), but {key} is 'none', which divides nothing among them: set "
            f"{key}=state (docs/scale.md)"
        )
    _check_devices(config.model.device, ranks)
    rollout, training = config.rollout, config.training
    fewest = rollout.tasks_per_iteration // training.minibatches * rollout.group_size
    if fewest < ranks:
        raise UserError(
            f"{ranks} ranks were asked for (--gpus), but a minibatch may have only {fewest} episodes "
            f"(rollout.tasks_per_iteration {rollout.tasks_per_iteration}, training.minibatches {training.minibatches}, "
            f"rollout.group_size {rollout.group_size}): ask for at most {fewest} ranks, or raise those"
        )


def _check_devices(device: str, ranks: int) -> None:
    if device == "cpu":
        return
    import torch

    if device not in ("auto", "cuda"):
        raise UserError(
            f"model.device is {device!r}, but each rank takes the GPU of its own number: set model.device=cuda, and "
            "CUDA_VISIBLE_DEVICES to choose GPUs"
        )
    if (count := torch.cuda.device_count()) < ranks:
        raise UserError(
            f"{ranks} ranks were asked for (--gpus), but torch sees {count} GPUs here: ask for no more than that. "
            "(Ranks on the CPU, to try it out: model.device=cpu)"
        )


async def check_engine(run: Run) -> None:
    """Check what depends on the loaded model.

    Raises:
        UserError: if ``objective.top_k`` does not fit the model's vocabulary.
    """
    want = run.objective().want
    try:
        await run.learner.logprobs([], want=want)
    except ValueError as error:
        raise UserError(f"objective.top_k is {want.k}: {error}") from error


def warm_start_note(config: RunConfig) -> str | None:
    """A note if the model's warm start rendered skills in another way than the run: it may then ignore them."""
    from skillsd.engines.torch.models import SHIPPED

    row, skills, name = method(config.method), config.skills, config.model.name
    if row.context == "none" and row.student_prompt == "plain":
        return None
    try:
        path = SHIPPED.get(name, Path(name).expanduser()) / "recipe.yaml"  # written by `skillsd sft`
        trained = yaml.safe_load(path.read_text(encoding="utf-8"))["warm_start"]
        # Before there was a key, the skill was always last.
        before = {"template": trained["template"], "place": trained.get("place", "after")}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None  # not a warm-started model
    if not (differing := [key for key, value in before.items() if value != getattr(skills, key)]):
        return None
    listed = " and ".join(f"warm_start.{key}={before[key]}" for key in differing)
    cure = " ".join(f"skills.{key}={before[key]}" for key in differing)
    return f"the model {name!r} learnt to read skills with {listed}; it may ignore them otherwise: set {cure}"


def in_turn_note(config: RunConfig) -> str | None:
    """A note if rollouts are an iteration old although the engine gains no time by it."""
    if not config.training.ahead or config.engine.provides().concurrent:
        return None
    return (
        f"training.ahead is 1, but the engine {config.engine.name!r} can't sample while it trains: rollouts are an "
        "iteration old, and take no less time"
    )


def engine_spec(config: RunConfig) -> EngineSpec:
    """The recipe's requirements on its engine."""
    row, model, training, teacher = method(config.method), config.model, config.training, config.teacher
    kind = {"none": "none", "frozen": "snapshot", "external": "external"}.get(row.teacher, "student")
    if row.teacher == "synchronised" and has_own_teacher(config, row):
        kind = "snapshot"
    return EngineSpec(
        model=model.name,
        seed=derive_seed(config.seed, "torch"),
        dtype=model.dtype,
        device=model.device,
        threads=model.threads,
        lora=_lora(config),
        gradient_checkpointing=model.gradient_checkpointing,
        teacher=kind,  # type: ignore[arg-type]
        teacher_average=row.teacher == "synchronised" and teacher.ema is not None,
        teacher_model=teacher.model if row.teacher == "external" else None,
        max_sessions=config.rollout.concurrency,
        max_sampled_tokens=_longest_sampled(config),
        context_tokens=config.skills.teacher_extra_tokens + PROMPT_MARGIN_TOKENS,
        micro_batch_tokens=training.micro_batch_tokens,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        in_thread=bool(training.ahead) or (row.uses_skills and not config.skills.deterministic),
        ahead=bool(training.ahead),
        needs=_needs(config, kind),
    )


def _needs(config: RunConfig, teacher: str) -> dict[str, str]:
    """Capability -> the setting that requires it."""
    row, by_method = method(config.method), f"method={config.method}"
    exact = objective_of(config, row).want.kind != "chosen"
    by_teacher = by_method
    if row.teacher == "synchronised":
        by_teacher = f"teacher.sync_every={config.teacher.sync_every}"
        if config.teacher.min_reading is not None:
            by_teacher = f"teacher.min_reading={config.teacher.min_reading:g}"
    wanted = {
        "distribution": f"objective.estimator={config.objective.estimator}" if exact else None,
        "temperature": f"rollout.temperature={config.rollout.temperature:g}"
        if config.rollout.temperature != 1
        else None,
        "teacher_average": f"teacher.ema={config.teacher.ema}" if config.teacher.ema is not None else None,
        "teacher_snapshot": by_teacher if teacher == "snapshot" and config.teacher.ema is None else None,
        "teacher_external": by_method if teacher == "external" else None,
        "teacher_sampling": by_method
        if row.sampler == "teacher"
        else f"teacher.min_reading={config.teacher.min_reading}"
        if config.teacher.min_reading is not None
        else None,
        "lora": "model.lora" if config.model.lora else "model.adapter" if config.model.adapter else None,
    }
    return {capability: setting for capability, setting in wanted.items() if setting is not None}


def _longest_sampled(config: RunConfig) -> tuple[int, str]:
    """The maximum length of a sampled sequence in tokens, and the settings it follows from."""
    row, skills, summariser = method(config.method), config.skills, config.summariser
    longest = [(config.rollout.trajectory_tokens, "rollout.trajectory_tokens")]
    in_students_prompt = row.student_prompt == "skill" or (row.uses_skills and skills.credit == "uplift")
    if in_students_prompt or config.reading.share or config.measures_reading:
        most = config.rollout.trajectory_tokens + skills.teacher_extra_tokens + PROMPT_MARGIN_TOKENS
        longest.append((most, f"rollout.trajectory_tokens + skills.teacher_extra_tokens + {PROMPT_MARGIN_TOKENS}"))
    if row.uses_skills and skills.summariser == "policy":  # at most one token per character
        most = summariser.max_input_chars + summariser.max_output_tokens + PROMPT_MARGIN_TOKENS
        longest.append((most, f"summariser.max_input_chars + summariser.max_output_tokens + {PROMPT_MARGIN_TOKENS}"))
    return max(longest)


def _lora(config: RunConfig) -> LoraOptions | None:
    lora, adapter = config.model.lora, config.model.adapter
    if lora and adapter:
        raise UserError(
            f"model.adapter is {adapter!r} and model.lora is given too, but the adapter has a rank of its own. Leave "
            "one of them out"
        )
    if adapter:
        return LoraOptions(adapter=adapter)
    return LoraOptions(lora.rank, lora.alpha, lora.target_modules) if lora else None


def workload(config: RunConfig, turns: int) -> Workload:
    """The work of one iteration, for the engine's estimate of memory and time.

    Args:
        turns: maximum number of turns of an episode.
    """
    return Workload(
        episodes=config.episodes_per_iteration,
        turns=turns,
        turn_tokens=config.rollout.turn_tokens,
        trajectory_tokens=config.rollout.trajectory_tokens,
        minibatches=config.training.minibatches,
        epochs=config.training.epochs,
        want=objective_of(config, method(config.method)).want.kind,
    )


def comparable(config: RunConfig) -> dict[str, object]:
    """The configuration without the settings that may change when a run is resumed."""
    defaults = RunConfig(name=config.name)
    access = {name: getattr(defaults.summariser, name) for name in SummariserSection.ACCESS}
    training = config.training.model_copy(update={"iterations": defaults.training.iterations})
    fixed = config.model_copy(
        update={
            "training": training,
            "summariser": config.summariser.model_copy(update=access),
            "evaluation": defaults.evaluation,
            "checkpoint": defaults.checkpoint,
            "log": defaults.log,
        }
    )
    return {**fixed.model_dump(), "engine": config.engine.resume_key()}
