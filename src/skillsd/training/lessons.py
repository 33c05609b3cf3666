"""Who is told what in training, beside the task: the skill that a task's bank offers, or the reference solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skillsd.skills.bank import StoredSkill
from skillsd.skills.context import render_skill
from skillsd.types import Group, Skill, Task

if TYPE_CHECKING:
    from skillsd.training.run import Run


@dataclass(frozen=True)
class Lesson:
    """What there is to be told about one task.

    Attributes:
        skill: the skill that was chosen, if the method uses skills and the bank has one.
        text: in words, as it is appended to a prompt; ``""`` says nothing more than the task; None: there is no
            lesson, so nobody who needs one can teach.
        too_long: it does not fit ``skills.teacher_extra_tokens``, so nobody is told (text is None).
    """

    skill: StoredSkill | None = None
    text: str | None = None
    too_long: bool = False


@dataclass(frozen=True)
class Told:
    """What each was told of a group's task, beside the task. None for the teacher: there is no teacher's signal."""

    actor: str = ""
    student: str = ""
    teacher: str | None = None


def choose(run: Run, tasks: Sequence[Task]) -> dict[str, Lesson]:
    """Task id -> the lesson that there is. Nothing is recorded in the bank: see `settle`."""
    sources = zip(tasks, *_sources(run, tasks), strict=True)
    return {task.id: _lesson(run, skill, oracle) for task, skill, oracle in sources}


def settle(run: Run, groups: Sequence[Group], lessons: Mapping[str, Lesson]) -> tuple[list[Lesson], list[Told]]:
    """For each group, the lesson that is really used and who is told what, now that it is known how the group fared.

    The bank counts the skills of the lessons that are used, and of those that are too long, as picked.
    """
    used: list[Lesson] = []
    words: list[Told] = []
    most = run.config.teacher.max_group_reward
    with run.bank.batch():
        for group in groups:
            lesson = lessons[group.task.id]
            said = told(run, lesson)
            if most is not None and sum(group.rewards) > most * len(group.rewards):
                said = replace(said, teacher=None)
            if said.teacher is None and not said.student and not lesson.too_long:
                lesson = Lesson()
            if lesson.skill:
                run.bank.record_pick(lesson.skill.id)
            used.append(lesson)
            words.append(said)
    return used, words


def told(run: Run, lesson: Lesson) -> Told:
    """Who is told what, by the method's switches."""
    row = run.method
    student = lesson.text or "" if row.student_prompt == "skill" else ""
    teacher = None if row.teacher == "none" else "" if row.context == "none" else lesson.text
    return Told(actor=student if row.sampler == "student" else teacher or "", student=student, teacher=teacher)


def _sources(run: Run, tasks: Sequence[Task]) -> tuple[list[StoredSkill | None], list[str | None]]:
    if run.method.context == "oracle":
        return [None] * len(tasks), [run.task_set.oracle(task) for task in tasks]
    if not run.method.uses_skills:
        return [None] * len(tasks), [None] * len(tasks)
    chosen = [run.bank.peek(task, c=run.config.skills.ucb_c) for task in tasks]
    if run.config.skills.content == "shuffled":
        # Each that has one gets the next one's: as fresh as its own and never its own, and the same groups are taught.
        having = [place for place, skill in enumerate(chosen) if skill]
        own = list(chosen)
        for place, other in zip(having, having[1:] + having[:1], strict=True):
            chosen[place] = own[other] if other != place else None
    return chosen, [None] * len(tasks)


def _lesson(run: Run, skill: StoredSkill | None, oracle: str | None) -> Lesson:
    # An oracle is worded as a skill's workflow, so that oracle and skill differ in what they say and not in how.
    said = skill.skill if skill else Skill("", "", oracle) if oracle else None
    if said is None:
        return Lesson()
    if skill and run.config.skills.content == "empty":
        return Lesson(skill, "")
    text = render_skill(said, run.template)
    if run.renderer.count(text) > run.config.skills.teacher_extra_tokens:
        return Lesson(skill, None, too_long=True)
    return Lesson(skill, text or None)  # a skill of which the template says nothing is no lesson
