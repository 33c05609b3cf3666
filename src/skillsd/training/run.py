"""The state of one training run: its parts and its progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skillsd.config import RunConfig
from skillsd.engines.base import Engine, Learner
from skillsd.envs.base import TaskSet
from skillsd.methods import Method
from skillsd.objective import Objective, find_term, scheduled
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.skills.background import BackgroundSummaries
from skillsd.skills.bank import Bank
from skillsd.training.curriculum import Curriculum
from skillsd.training.imitation import BestSuccesses
from skillsd.training.rollouts import Rollouts


@dataclass
class Run:
    """Everything that the training loop works on.

    Attributes:
        template: text of the template that renders a skill into a prompt.
        summaries: None if the method uses no skills.
        best: the successes that the student imitates; None if the method has no self-imitation.
        reading: the first teacher's (``first``), which ``teacher.min_reading`` compares with; empty until it is needed.
        taught: task id -> (skill, mean reward) of its last visit, if a skill taught it; for ``skills.credit: change``.
        iteration: number of finished iterations.
        visits: task id -> number of iterations that picked it, see `Curriculum.pick`.
        totals: episodes, sampled tokens and seconds since the start.
        ahead: the next iteration's rollouts, if they were sampled while the last one was trained.
    """

    config: RunConfig
    method: Method
    folder: Path
    engine: Engine
    renderer: ChatRenderer
    task_set: TaskSet
    curriculum: Curriculum
    template: str
    bank: Bank
    summaries: BackgroundSummaries | None
    best: BestSuccesses | None = None
    reading: dict[str, float] = field(default_factory=dict)
    taught: dict[str, Sequence[float]] = field(default_factory=dict)
    iteration: int = 0
    visits: Mapping[str, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=lambda: {"episodes": 0, "sampled_tokens": 0, "seconds": 0.0})
    ahead: Rollouts | None = None

    @property
    def learner(self) -> Learner:
        return self.engine.learner

    @property
    def budget(self) -> Budget:
        """The limits of an episode under the plain prompt."""
        return Budget.of(self.config.rollout, self.task_set, self.engine.max_length)

    @property
    def student(self) -> EnginePolicy:
        """The student at the training temperature."""
        return EnginePolicy(self.engine, self.renderer, self.config.rollout.temperature)

    @property
    def policy(self) -> EnginePolicy:
        """The policy of the training rollouts: the student, or in some ablations the teacher."""
        return dataclasses.replace(self.student, weights=self.method.sampler)

    def student_at(self, temperature: float) -> EnginePolicy:
        """The student at another temperature (0: greedy)."""
        return dataclasses.replace(self.student, temperature=temperature)

    @property
    def has_own_teacher(self) -> bool:
        """Whether the teacher has weights of its own; otherwise it is the student."""
        return has_own_teacher(self.config, self.method)

    @property
    def recorded(self) -> bool:
        """Whether this iteration's trajectories are written."""
        every = self.config.log.trajectories_every
        return bool(every) and self.iteration % every == 0

    def objective(self) -> Objective:
        """The objective of this iteration."""
        progress = self.iteration / max(1, self.config.training.iterations)
        return objective_of(self.config, self.method, progress)

    def learning_rate(self) -> float:
        """Of this iteration, with the warm-up."""
        options = self.config.training
        if self.iteration < options.warmup_iterations:
            return options.learning_rate * (self.iteration + 1) / options.warmup_iterations
        return options.learning_rate

    def close(self) -> None:
        self.bank.close()
        self.engine.close()


def has_own_teacher(config: RunConfig, row: Method) -> bool:
    """Whether the teacher has weights of its own. One that is synchronised every iteration needs none."""
    options = config.teacher
    always = options.sync_every == 1 and options.ema is None and options.min_reading is None
    return row.teacher in ("frozen", "external") or (row.teacher == "synchronised" and not always)


def objective_of(config: RunConfig, row: Method, progress: float = 0.0) -> Objective:
    """The method's weights, overridden by the recipe's, with lambda as scheduled after a share `progress` of training.

    Raises:
        UserError: for settings of the section ``objective`` that do not fit together, or can't be imported.
    """
    options = config.objective
    # With a reward term, lambda is a trade-off; in distillation-only methods it only rescales the gradient.
    lambda_sdl = _or(options.lambda_sdl, row.lambda_sdl) if row.reward_weight else row.lambda_sdl
    return Objective(
        reward_weight=_or(options.reward_weight, row.reward_weight),
        lambda_sdl=0.0 if row.teacher == "none" else scheduled(lambda_sdl, options.lambda_schedule, progress),
        normaliser=options.normaliser or row.normaliser,
        imitation_weight=_imitation_weight(config, row),
        estimator=options.estimator,
        top_k=options.top_k,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        distil_clamp=options.distil_clamp,
        importance_cap=options.importance_cap,
        extra_terms=tuple(find_term(t.name, t.fn, t.weight, t.mask, t.normaliser) for t in options.terms),
    )


def _imitation_weight(config: RunConfig, row: Method) -> float:
    """Of the imitated tokens: the task's best success, or replayed demonstrations."""
    if config.reading.replay:
        return config.reading.replay_weight
    return _or(config.objective.imitation_weight, row.imitation_weight) if row.imitation_weight else 0.0


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
