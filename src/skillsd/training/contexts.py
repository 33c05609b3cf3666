"""The extra context of each role's prompt in training: a skill from the task's bank, or the reference solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skillsd.prompting.templates import render_skill
from skillsd.skills.bank import StoredSkill
from skillsd.training.rollouts import TeacherContext
from skillsd.types import Group, Skill, Task

if TYPE_CHECKING:
    from skillsd.training.run import Run


@dataclass(frozen=True)
class PromptContexts:
    """Extra context in each role's prompt. ``teacher=None`` disables distillation for the group."""

    sampler: str = ""
    student: str = ""
    teacher: str | None = None


def select_contexts(run: Run, tasks: Sequence[Task]) -> dict[str, TeacherContext]:
    """Task id -> the context that is available now, with a skill picked by the bank's rule (UCB).

    Nothing is recorded: see `commit_contexts`.
    """
    if run.method.context == "oracle":
        return {task.id: _oracle_context(run, task) for task in tasks}
    if not run.method.uses_skills:
        return {task.id: TeacherContext() for task in tasks}
    picked = [run.bank.peek(task, c=run.config.skills.ucb_c) for task in tasks]
    if run.config.skills.content == "shuffled":
        picked = _shuffled(picked)
    return {task.id: _skill_context(run, skill) for task, skill in zip(tasks, picked, strict=True)}


def context_of(run: Run, task: Task) -> TeacherContext:
    """The context that the method would give the task's teacher now, whatever ``skills.content`` is."""
    if run.method.context == "oracle":
        return _oracle_context(run, task)
    skill = run.bank.peek(task, c=run.config.skills.ucb_c)
    return TeacherContext() if skill is None else _rendered(run, skill.skill, skill)


def commit_contexts(
    run: Run, groups: Sequence[Group], available: Mapping[str, TeacherContext]
) -> tuple[list[TeacherContext], list[PromptContexts]]:
    """Decide, now that the rewards are known, which contexts are used; returns them and the prompt contexts, by group.

    The bank counts the skills of the used contexts, and of those that are too long, as picked.
    """
    used: list[TeacherContext] = []
    prompts: list[PromptContexts] = []
    limit = run.config.teacher.max_group_reward
    with run.bank.batch():
        for group in groups:
            context = available[group.task.id]
            contexts = contexts_for(run, context)
            if limit is not None and sum(group.rewards) > limit * len(group.rewards):
                contexts = replace(contexts, teacher=None)
            if contexts.teacher is None and not contexts.student and not context.too_long:
                context = TeacherContext()
            if context.skill and not context.reading:  # UCB's statistics are of the skills that taught
                run.bank.record_pick(context.skill.id)
            used.append(context)
            prompts.append(contexts)
    return used, prompts


def contexts_for(run: Run, context: TeacherContext) -> PromptContexts:
    """Which role's prompt the context goes into, by the method's switches."""
    if context.reading and context.text:
        return PromptContexts(sampler=context.text, student=context.text)
    row = run.method
    student = context.text or "" if row.student_prompt == "skill" else ""
    teacher = None if row.teacher == "none" else "" if row.context == "none" else context.text
    return PromptContexts(
        sampler=student if row.sampler == "student" else teacher or "", student=student, teacher=teacher
    )


def _shuffled(picked: Sequence[StoredSkill | None]) -> list[StoredSkill | None]:
    """Each task that has a skill gets the skill of the next such task: equally recent, and never its own."""
    shuffled = list(picked)
    having = [place for place, skill in enumerate(picked) if skill]
    for place, other in zip(having, having[1:] + having[:1], strict=True):
        shuffled[place] = picked[other] if other != place else None
    return shuffled


def _oracle_context(run: Run, task: Task) -> TeacherContext:
    # Rendered as a skill's workflow, so that oracle and skill differ only in content.
    oracle = run.task_set.oracle(task)
    return _rendered(run, Skill("", "", oracle), None) if oracle else TeacherContext()


def _skill_context(run: Run, skill: StoredSkill | None) -> TeacherContext:
    if skill is None:
        return TeacherContext()
    if run.config.skills.content == "empty":
        return TeacherContext(skill, "")
    return _rendered(run, skill.skill, skill)


def _rendered(run: Run, content: Skill, skill: StoredSkill | None) -> TeacherContext:
    text = render_skill(content, run.template)
    if run.renderer.count(text) > run.config.skills.teacher_extra_tokens:
        return TeacherContext(skill, None, too_long=True)
    return TeacherContext(skill, text or None)  # empty if the template uses none of the skill's non-empty fields
