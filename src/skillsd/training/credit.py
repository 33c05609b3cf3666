"""What used skills are credited with (``skills.credit``), which the picking rules go by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from skillsd.evaluation.uplift import measure_uplift
from skillsd.seeds import derive_seed
from skillsd.training.rollouts import TeacherContext
from skillsd.types import Group

if TYPE_CHECKING:
    from skillsd.training.run import Run


async def values_of(run: Run, groups: Sequence[Group], used: Sequence[TeacherContext]) -> list[Sequence[float]]:
    """For each group, the values to credit the skill of its context with. To be called before the update, since uplift
    is measured with the policy that the skill is to teach."""
    kind = run.config.skills.credit
    if kind == "source":
        return [[context.skill.source_reward] if context.skill else [] for context in used]
    if kind != "uplift":
        return [group.rewards for group in groups]
    pairs = zip(groups, used, strict=True)
    taught = [(group, context.text) for group, context in pairs if context.text and not context.reading]
    measured = await measure_uplift(
        run.student,
        run.task_set,
        [(group.task, text) for group, text in taught],
        run.budget,
        episodes=run.config.skills.uplift_episodes,
        seed=derive_seed(run.config.seed, "uplift", run.iteration),
        concurrency=run.config.rollout.concurrency,
        retries=run.config.rollout.retries,
        plain={group.task.id: _mean(group.rewards) for group, _ in taught},
    )
    run.totals["episodes"] += sum(uplift.episodes for uplift in measured)
    by_task = {uplift.task_id: uplift.reward for uplift in measured}
    return [[by_task[group.task.id]] if group.task.id in by_task else [] for group in groups]


def credit_skills(
    run: Run,
    groups: Sequence[Group],
    used: Sequence[TeacherContext],
    in_prompt: Sequence[bool],
    values: Sequence[Sequence[float]],
) -> None:
    """Credit the skills that were in a prompt; under ``change``, those of each task's last visit.

    Args:
        in_prompt: for each group, whether its context was in a prompt.
        values: as `values_of` returns them.
    """
    with run.bank.batch():
        for group, context, seen, own in zip(groups, used, in_prompt, values, strict=True):
            skill = context.skill.id if context.skill and seen else None
            if run.config.skills.credit != "change":
                if skill is not None:
                    run.bank.credit(skill, own)
                continue
            if context.reading:  # its rewards are under another prompt
                continue
            reward = _mean(group.rewards)
            if before := run.taught.pop(group.task.id, None):
                run.bank.credit(int(before[0]), [reward - before[1]])
            if skill is not None:
                run.taught[group.task.id] = (skill, reward)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
