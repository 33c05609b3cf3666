"""Folders of runs that were never trained: real boards under random moves, made-up log-probs, any size, in seconds.

For the tests of the report, and for the measurements in docs/report.md:
``python tests/page/made_up_run.py FOLDER --iterations 40 --tasks 16``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.envs.sokoban.environment import Sokoban
from skillsd.envs.sokoban.game import Game, level_of
from skillsd.objective import group_advantages
from skillsd.report.writer import EVALUATIONS, METRICS, TRAJECTORIES
from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup, write_groups
from skillsd.runs.build import BANK
from skillsd.runs.folder import CONFIG
from skillsd.skills.bank import Bank
from skillsd.types import Outcome, Skill, Task, Trajectory, Turn

MOVES = ("Up", "Down", "Left", "Right")
WORDS = (
    " I",
    " move",
    " the",
    " box",
    " towards",
    " its",
    " target",
    ",",
    " so",
    " go",
    *(f" {move}" for move in MOVES),
)
PROMPT_TOKENS = 12


def make_run(
    folder: Path,
    *,
    iterations: int = 4,
    tasks: int = 3,
    group_size: int = 4,
    thoughts: int = 2,
    seed: int = 0,
    method: str = "skill-sd",
    wanted: int | None = None,
    words: Sequence[str] = WORDS,
    observation: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A run's folder; returns it.

    Args:
        tasks, group_size: groups of an iteration, and episodes of a group.
        thoughts: sampled tokens of a turn before its move.
        wanted: iterations that the run was to have; default: those that it has.
        words: texts of the token ids 1, 2, ...
        observation: added to every observation.
    """
    rng = random.Random(seed)
    rollout = {"tasks_per_iteration": tasks, "group_size": group_size, "trajectory_tokens": 4096, "turn_tokens": 64}
    sections: dict[str, Any] = {
        "name": "synthetic",
        "method": method,
        "seed": seed,
        "rollout": rollout,
        "training": {"iterations": wanted or iterations, "minibatches": 1},
        "objective": {"lambda_sdl": 0.1},
        **(settings or {}),
    }
    config = RunConfig.model_validate(sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(configs.dump(config))
    manifest = {"started": "2026-11-28T00:00:00Z", "commit": "0" * 40, "panels": {"tune": "a" * 16}, "model": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = Sokoban(**config.environment.options)
    train = environment.tasks("train")
    metrics, evaluations = [], [_evaluation(0, 0, 0.25)]
    with_skills = method == "skill-sd"
    with Bank(folder / BANK) as bank:
        for iteration in range(1, iterations + 1):
            groups = []
            for place in range(tasks):
                task = train[(iteration * tasks + place) % max(tasks * 2, 1) % len(train)]
                skill_id = None
                if with_skills and (stored := bank.skills(task.id)):
                    skill_id = stored[-1].id
                    bank.record_pick(skill_id)
                group = _group(
                    rng, environment, task, iteration, group_size, thoughts, skill_id, method, words, observation
                )
                groups.append(group)
                if with_skills:
                    for member, episode in enumerate(group.episodes[:1]):
                        bank.add(
                            task,
                            Skill("", "", f"{words[-1]} {episode.trajectory.turns[0].action} {iteration}"),
                            source=f"iteration-{iteration}/{task.id}/{member}",
                            iteration=iteration,
                            reward=episode.trajectory.reward,
                            outcome=episode.trajectory.outcome,
                        )
                if skill_id is not None:
                    bank.credit(skill_id, group.rewards)
            write_groups(folder / TRAJECTORIES, iteration, groups)
            metrics.append(_metrics(rng, iteration, groups, len(bank) if with_skills else None))
        evaluations.append(_evaluation(iterations, iterations * tasks * group_size, 0.4))
    for name, records in ((METRICS, metrics), (EVALUATIONS, evaluations)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _group(
    rng: random.Random,
    environment: Sokoban,
    task: Task,
    iteration: int,
    size: int,
    thoughts: int,
    skill_id: int | None,
    method: str,
    words: Sequence[str],
    observation: str,
) -> RecordedGroup:
    played = [_play(rng, environment, task, thoughts, words, observation) for _ in range(size)]
    advantages = group_advantages([trajectory.reward for trajectory in played]).tolist()
    episodes = []
    for trajectory, advantage in zip(played, advantages, strict=True):
        old = [p for p, sampled in zip(trajectory.logprobs, trajectory.action_mask, strict=True) if sampled]
        student = tuple(min(0.0, p + rng.gauss(0, 0.02)) for p in old)
        teacher = tuple(min(0.0, p + rng.choice((0, 0, -1.5, 0.8)) * rng.random()) for p in student)
        taught = {"teacher_logprobs": teacher, "divergence": tuple(map(_k3, student, teacher))} if skill_id else {}
        episodes.append(RecordedEpisode(trajectory, advantage, student_logprobs=student, **taught))
    prompt = played[0].prompt[0].content
    taught = skill_id is not None
    text = f"Steps that worked: {words[-1]}"
    return RecordedGroup(
        iteration=iteration,
        task=task,
        context="skill" if taught else None,
        skill_id=skill_id,
        context_text=text if taught else None,
        teacher_prompt=f"<user>{text}\n\n{prompt}<assistant>" if taught else None,
        teacher_prompt_length=PROMPT_TOKENS + 5 if taught else None,
        student_prompt=f"<user>{prompt}<assistant>",
        student_prompt_length=PROMPT_TOKENS,
        taught=taught,
        untaught=None if taught or method != "skill-sd" else "there is no skill for this task yet",
        minibatch=0,
        applied=True,
        episodes=tuple(episodes),
        token_texts=dict(enumerate(words, 1)),
    )


def _k3(student: float, teacher: float) -> float:
    return math.expm1(teacher - student) + student - teacher


def _play(
    rng: random.Random, environment: Sokoban, task: Task, thoughts: int, words: Sequence[str], observation: str
) -> Trajectory:
    game = Game(level_of(task), environment.rules)
    tokens, mask, logprobs = [0] * PROMPT_TOKENS, [False] * PROMPT_TOKENS, [0.0] * PROMPT_TOKENS
    turns: list[Turn] = []
    step = None
    prompt = game.prompt()
    while step is None or not step.done:
        spoken = [rng.randrange(1, len(words) - 3) for _ in range(thoughts)]
        move = rng.randrange(4)
        ids = [*spoken, len(words) - 3 + move]
        start = len(tokens)
        tokens += ids
        mask += [True] * len(ids)
        logprobs += [math.log(rng.uniform(0.05, 1)) for _ in ids]
        step = game.step(MOVES[move])
        seen = step.observation + observation
        turns.append(Turn("".join(words[i - 1] for i in ids), seen, start, len(tokens), step.info))
        tokens += [0, 0]
        mask += [False] * 2
        logprobs += [0.0] * 2
    outcome = Outcome.SOLVED if step.success else Outcome.TRUNCATED_TURNS
    return Trajectory(
        task=task, prompt=prompt, tokens=tuple(tokens), action_mask=tuple(mask), logprobs=tuple(logprobs),
        prompt_length=PROMPT_TOKENS, turns=tuple(turns), outcome=outcome, reward=step.reward, success=step.success,
        seed=rng.getrandbits(63), versions=(0, 0),
    )  # fmt: skip


def _metrics(rng: random.Random, iteration: int, groups: Sequence[RecordedGroup], skills: int | None) -> dict[str, Any]:
    episodes = [episode for group in groups for episode in group.episodes]
    gaps = [-gap for episode in episodes for gap in episode.gaps or ()]
    return {
        "iteration": iteration,
        "episodes": iteration * len(episodes),
        "sampled_tokens": 1,
        "seconds": 10.0 * iteration,
        "rollout/accuracy": sum(e.trajectory.success for e in episodes) / len(episodes),
        "rollout/reward": sum(e.trajectory.reward for e in episodes) / len(episodes),
        "rollout/tokens": sum(len(e.trajectory.tokens) for e in episodes) / len(episodes),
        "rollout/turns": sum(len(e.trajectory.turns) for e in episodes) / len(episodes),
        "rollout/entropy_estimate": rng.uniform(0.4, 0.6),
        "outcome/solved": 0.1,
        "batch/groups_with_teacher": sum(group.taught for group in groups) / len(groups),
        "batch/zero_advantage_groups": 0.25,
        "loss/teacher_log_ratio": sum(gaps) / len(gaps) if gaps else None,
        "sampler_trainer_logprob_diff/max": 1e-6,
        "step/applied": 1.0,
        **({} if skills is None else _skill_metrics(iteration, len(episodes), skills)),
    }


def _skill_metrics(iteration: int, episodes: int, skills: int) -> dict[str, Any]:
    return {
        "skills/new": 1,
        "skills/skills": skills,
        "summaries/submitted": iteration * episodes,
        "summaries/added": skills,
        "summaries/rejected_too_long": iteration,
    }


def _evaluation(iteration: int, episodes: int, accuracy: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "episodes": episodes,
        "seconds": 10.0 * iteration,
        "eval/accuracy": accuracy,
        "eval/interval": [accuracy - 0.05, accuracy + 0.05],
        "eval/completion": accuracy,
        "eval/completion_interval": [accuracy - 0.05, accuracy + 0.05],
        "eval/tasks": 64,
        "eval/split": "tune",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("iterations", 40), ("tasks", 16), ("group-size", 8), ("thoughts", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    make_run(given.pop("folder"), **given)


if __name__ == "__main__":
    main()
