"""Skill-SD in one file: Algorithm 1 of the paper (arXiv 2604.10674), top to bottom.

The engine, the environment and the episodes are the package's; the method itself (advantages, UCB, the teacher's
prompt, both losses, the bank) is written out here. A test checks that its steps equal those of the package's loop.

    python examples/skill_sd_one_file.py      # the tiny agent on Sokoban, a few minutes on one CPU core
"""

import asyncio
import math
from dataclasses import dataclass, field

import torch

from skillsd.config import CurriculumSection
from skillsd.engines.base import TokenSequence, TrainItem
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.envs import registry
from skillsd.metrics import Mean
from skillsd.prompting.renderer import ChatRenderer
from skillsd.prompting.templates import load_template, render_skill
from skillsd.rollouts.collect import collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.seeds import derive_seed
from skillsd.training.curriculum import Curriculum
from skillsd.types import Skill, Trajectory


@dataclass
class Settings:
    environment: str = "sokoban"
    options: dict = field(default_factory=lambda: {"preset": "nano"})
    model: str = "nano"
    iterations: int = 12
    tasks: int = 16  # per iteration
    group: int = 8  # G, episodes per task
    turn_tokens: int = 4
    trajectory_tokens: int = 128
    learning_rate: float = 2e-4
    lambda_sdl: float = 0.1  # the paper's 0.001 is for a 4B model
    clip_low: float = 0.2
    clip_high: float = 0.28
    ucb_c: float = math.sqrt(2)
    template: str = "teacher_terse"
    place: str = "before"  # of the skill: before the task
    seed: int = 0


# -- the skill bank: B(x), picked by UCB --------------------------------------------------------------------------


@dataclass
class Entry:
    """A skill e of one task, with its record."""

    skill: Skill
    source_reward: float
    picks: int = 0  # n(e)
    rewards: list[float] = field(default_factory=list)  # of the rollouts trained while it was the teacher's skill


def pick_by_ucb(bank: list[Entry], c: float) -> Entry | None:
    """A skill that was never picked goes first, the newest of them; else mean_reward(e) + c * sqrt(ln N / n(e))."""
    total = sum(entry.picks for entry in bank)

    def score(place: int) -> tuple[float, int]:
        entry = bank[place]
        if not entry.picks:
            return math.inf, place
        mean = sum(entry.rewards) / len(entry.rewards) if entry.rewards else 0.0
        return mean + c * math.sqrt(math.log(total) / entry.picks), place

    return bank[max(range(len(bank)), key=score)] if bank else None


# -- the losses ---------------------------------------------------------------------------------------------------


def advantages(rewards: list[float]) -> list[float]:
    """A_i = (R_i - mean R) / (std R + eps) over one group."""
    values = torch.tensor(rewards, dtype=torch.float64)
    if bool((values == values[0]).all()):
        return [0.0] * len(rewards)
    return ((values - values.mean()) / (values.std(correction=0) + 1e-6)).tolist()


@dataclass(frozen=True)
class SkillSD:
    """L = L_GRPO + lambda * L_SDL, both a sum over tokens divided by N, the action tokens of the whole batch."""

    lambda_sdl: float
    clip_low: float
    clip_high: float
    tokens: int  # N

    def __call__(self, student, signals):
        logp, old, q = student.chosen, signals["old"], signals["teacher"]
        # The clipped surrogate, -min(rho A, clip(rho) A).
        rho, advantage = (logp - old).exp(), signals["advantage"]
        clipped = rho.clamp(1 - self.clip_low, 1 + self.clip_high)
        policy = -torch.minimum(rho * advantage, clipped * advantage).sum()
        # Importance-weighted reverse KL. Its gradient is rho * l * grad log pi, written as a surrogate.
        taught = signals["taught"]
        log_ratio, weight = (logp - q).detach()[taught], rho.detach()[taught]
        distillation = (weight * log_ratio * logp[taught]).sum()
        k3 = weight * (torch.expm1(-log_ratio) + log_ratio)
        metrics = {"l_sdl": Mean(float(k3.sum()), len(k3))} if len(k3) else {}
        return (policy + self.lambda_sdl * distillation) / max(self.tokens, 1), metrics


# -- one iteration ------------------------------------------------------------------------------------------------


def teacher_sequence(trajectory: Trajectory, context: str, renderer: ChatRenderer) -> TokenSequence:
    """The student's own ids verbatim, behind a prompt that holds the skill."""
    prompt = renderer.prompt(trajectory.prompt, context)
    start = trajectory.prompt_length
    mask = (*[False] * len(prompt), *trajectory.action_mask[start:])
    return TokenSequence((*prompt, *trajectory.tokens[start:]), mask)


async def train(settings: Settings, on_iteration=print):
    """Run Algorithm 1; returns the engine and the bank."""
    torch.set_num_threads(1)
    task_set = registry.load(settings.environment, settings.options)
    spec = EngineSpec(model=settings.model, seed=derive_seed(settings.seed, "torch"), device="cpu", teacher="student")
    engine = TorchOptions().build(spec)
    learner = engine.learner
    renderer = ChatRenderer(engine.tokenizer, engine.stop_tokens, place=settings.place)
    summarise, template = task_set.summariser(), load_template(settings.template)
    budget = Budget(task_set.max_turns, settings.turn_tokens, settings.trajectory_tokens)
    curriculum = Curriculum(
        task_set.tasks("train"), CurriculumSection(), per_iteration=settings.tasks, iterations=settings.iterations,
        seed=settings.seed,
    )  # fmt: skip
    bank: dict[str, list[Entry]] = {}
    visits: dict[str, int] = {}
    for number in range(settings.iterations):
        # 1. Synchronise the teacher: the same weights as the student.
        await learner.sync_teacher()
        # 2. Pick tasks. 3. The student samples G trajectories of each, under the plain prompt.
        tasks, visits = curriculum.pick(number, visits)
        await engine.publish()
        policy, seed = EnginePolicy(engine, renderer), derive_seed(settings.seed, "rollout", number)
        groups = (await collect(policy, task_set, tasks, budget, group_size=settings.group, seed=seed)).groups
        # 4. Pick each task's skill by UCB. The first visit to a task has none: plain GRPO.
        picked = [pick_by_ucb(bank.get(group.task.id, []), settings.ucb_c) for group in groups]
        # 5. The teacher re-scores the student's own tokens, with the skill in its prompt.
        items, to_teach = [], []
        for group, entry in zip(groups, picked, strict=True):
            if entry:
                entry.picks += 1
            for trajectory, advantage in zip(group.trajectories, advantages(group.rewards), strict=True):
                old = [p for p, sampled in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if sampled]
                signals = {
                    "old": torch.tensor(old),
                    "advantage": torch.full((len(old),), advantage, dtype=torch.float32),
                    "teacher": torch.zeros(len(old)),
                    "taught": torch.full((len(old),), entry is not None),
                }
                items.append(TrainItem(TokenSequence(trajectory.tokens, trajectory.action_mask), signals))
                if entry:
                    context = render_skill(entry.skill, template)
                    to_teach.append((teacher_sequence(trajectory, context, renderer), signals))
        scored = await learner.logprobs([sequence for sequence, _ in to_teach], "teacher")
        for (_, signals), logprobs in zip(to_teach, scored, strict=True):
            signals["teacher"] = logprobs.chosen
        # 6. One optimiser step on L_GRPO + lambda * L_SDL.
        tokens = sum(item.sequence.marked for item in items)
        loss = SkillSD(settings.lambda_sdl, settings.clip_low, settings.clip_high, tokens)
        metrics = await learner.forward_backward(items, loss)
        report = await learner.step(settings.learning_rate)
        # 7. Credit the skills with the rewards they taught under.
        for group, entry in zip(groups, picked, strict=True):
            if entry and report.applied:
                entry.rewards += group.rewards
        # 8. Summarise the trajectories into skills for later visits; a text that the task has already is not added.
        for group in groups:
            for trajectory in group.trajectories:
                skill, known = summarise(trajectory), bank.setdefault(group.task.id, [])
                if skill and all(entry.skill != skill for entry in known):
                    known.append(Entry(skill, trajectory.reward))
        rewards = [reward for group in groups for reward in group.rewards]
        distillation = metrics["l_sdl"].value if "l_sdl" in metrics else math.nan
        on_iteration(
            f"iteration {number + 1}: reward {sum(rewards) / len(rewards):.3f}, "
            f"{sum(entry is not None for entry in picked)} of {len(groups)} groups with a teacher, "
            f"L_SDL {distillation:.4f}, gradient norm {report.grad_norm:.6f}"
        )
    return engine, bank


if __name__ == "__main__":
    asyncio.run(train(Settings()))
