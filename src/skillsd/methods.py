"""Every method is a row of one table (METHOD.md, "One objective, five switches"); none has its own trainer.

A method whose switches the training loop can run is added by a row in `METHODS`, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from skillsd.errors import unknown_name


@dataclass(frozen=True)
class Method:
    """The switches.

    Attributes:
        name: as recipes and tables write it.
        reward_weight: weight of the reward's term, L_GRPO; 0 is distillation alone.
        lambda_sdl: weight of the teacher's term, L_SDL; 0 is no teacher. A recipe may set another value.
        context: what the teacher is told beside the task: a skill from the bank, or a reference solution.
        teacher: whose weights the teacher has: the student's, copied every few iterations (``synchronised``)
            or once at the start (``frozen``), or another model's (``external``).
        student_prompt: what the student is told *in training*; at test time it is always ``plain``.
        sampler: who acts in the training rollouts.
        description: one line for people.

    Raises:
        ValueError: if the switches contradict each other.
    """

    name: str
    reward_weight: float
    lambda_sdl: float
    context: Literal["none", "skill", "oracle"]
    teacher: Literal["synchronised", "frozen", "external", "none"]
    student_prompt: Literal["plain", "skill"]
    sampler: Literal["student", "teacher"]
    description: str

    def __post_init__(self) -> None:
        if self.reward_weight < 0 or self.lambda_sdl < 0 or self.reward_weight == self.lambda_sdl == 0:
            raise ValueError(f"method {self.name!r}: weights must be 0 or more, and one of them more")
        if (self.teacher == "none") != (self.lambda_sdl == 0):
            raise ValueError(f"method {self.name!r}: lambda {self.lambda_sdl}, but teacher {self.teacher!r}")
        if self.teacher == "none" and (self.context != "none" or self.sampler == "teacher"):
            raise ValueError(f"method {self.name!r}: no teacher, so it has no context and can't sample")
        if self.teacher == "synchronised" and self.context == "none" and self.student_prompt == "plain":
            raise ValueError(f"method {self.name!r}: its teacher is the student and is told nothing more")


_ROWS = (
    Method(
        name="grpo",
        reward_weight=1.0,
        lambda_sdl=0.0,
        context="none",
        teacher="none",
        student_prompt="plain",
        sampler="student",
        description="Group-relative policy gradient from the reward alone.",
    ),
    Method(
        name="skill-sd",
        reward_weight=1.0,
        lambda_sdl=0.001,  # the paper's, for its 4B model
        context="skill",
        teacher="synchronised",
        student_prompt="plain",
        sampler="student",
        description="GRPO, plus distillation from the student itself once it has read a skill.",
    ),
    Method(
        name="skill-sd-frozen",
        reward_weight=1.0,
        lambda_sdl=0.001,
        context="skill",
        teacher="frozen",
        student_prompt="plain",
        sampler="student",
        description="Skill-SD whose teacher keeps the base model's weights (an ablation of the paper's).",
    ),
    Method(
        name="opd",
        reward_weight=0.0,
        lambda_sdl=1.0,
        context="skill",
        teacher="synchronised",
        student_prompt="plain",
        sampler="student",
        description="Distillation alone, from the teacher that has read a skill; no reward.",
    ),
    Method(
        name="opsd",
        reward_weight=0.0,
        lambda_sdl=1.0,
        context="oracle",
        teacher="frozen",
        student_prompt="plain",
        sampler="student",
        description="Distillation alone, from a frozen teacher that has read the reference solution.",
    ),
    Method(
        name="grpo-opsd",
        reward_weight=1.0,
        lambda_sdl=0.001,
        context="oracle",
        teacher="frozen",
        student_prompt="plain",
        sampler="student",
        description="GRPO and OPSD together.",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        UserError: if there is none.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def methods_table(methods: Iterable[Method] | None = None) -> str:
    """Names and switches as a Markdown table, aligned so that it reads well as plain text too."""
    rows = [["method", "reward", "lambda", "teacher told", "teacher", "student's prompt", "sampler"]]
    for m in METHODS.values() if methods is None else methods:
        weights = [f"{m.reward_weight:g}", f"{m.lambda_sdl:g}"]
        rows.append([m.name, *weights, m.context, m.teacher, m.student_prompt, m.sampler])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
