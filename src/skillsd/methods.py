"""The training methods: each is a row of switches over the same loop (docs/method.md, "Methods are rows").

A new combination of switches needs nothing but a new row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from skillsd.errors import unknown_name


@dataclass(frozen=True)
class Method:
    """The switches of a method.

    Attributes:
        name: the name in recipes and tables.
        reward_weight: weight of the policy-gradient term, L_GRPO. 0: distillation only.
        lambda_sdl: weight of the distillation term, L_SDL. 0: no teacher. The default of ``objective.lambda_sdl``.
        normaliser: what divides L_SDL's sum over tokens: N, the action tokens, as in L_GRPO (``tokens``, the paper's),
            or only those with a teacher (``taught``). The default of ``objective.normaliser``. Distillation-only
            methods have no reward to balance; with ``taught`` their gradient's scale is the same in every iteration.
        imitation_weight: weight of the negative log-likelihood of the task's best success so far. 0: no self-imitation.
            The default of ``objective.imitation_weight``.
        context: the teacher's extra context: a skill from the bank, or a reference solution.
        teacher: the teacher's weights: the student's, copied every few iterations (``synchronised``) or once at the
            start (``frozen``), or another model's (``external``).
        student_prompt: the student's prompt *in training*; at test time it is always ``plain``.
        sampler: the policy of the training rollouts. The teacher samples under its own prompt, which contains the
            skill; the student trains on those actions under the student's prompt.
        description: one line for `skillsd methods`.

    Raises:
        ValueError: if the switches contradict each other.
    """

    name: str
    reward_weight: float
    lambda_sdl: float
    normaliser: Literal["tokens", "taught"]
    imitation_weight: float
    context: Literal["none", "skill", "oracle"]
    teacher: Literal["synchronised", "frozen", "external", "none"]
    student_prompt: Literal["plain", "skill"]
    sampler: Literal["student", "teacher"]
    description: str

    def __post_init__(self) -> None:
        weights = (self.reward_weight, self.lambda_sdl, self.imitation_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"method {self.name!r}: weights must not be negative, and at least one must be positive")
        if (self.teacher == "none") != (self.lambda_sdl == 0):
            raise ValueError(f"method {self.name!r}: lambda_sdl is {self.lambda_sdl}, but teacher is {self.teacher!r}")
        if self.teacher == "none" and (self.context != "none" or self.sampler == "teacher"):
            raise ValueError(f"method {self.name!r}: without a teacher, context must be 'none' and sampler 'student'")
        if self.teacher == "synchronised" and self.context == "none" and self.student_prompt == "plain":
            raise ValueError(f"method {self.name!r}: the teacher equals the student: same weights, no extra context")

    @property
    def has_context(self) -> bool:
        """Whether any training prompt contains extra context."""
        return self.context != "none" or self.student_prompt == "skill"

    @property
    def uses_skills(self) -> bool:
        """Whether any training prompt contains a skill."""
        return "skill" in (self.context, self.student_prompt)

    @property
    def sampler_sees_context(self) -> bool:
        """Whether the sampling policy's prompt contains the context. If so, it is selected before the rollouts."""
        return self.student_prompt == "skill" or (self.sampler == "teacher" and self.context != "none")


_GRPO = Method(
    name="grpo",
    reward_weight=1.0,
    lambda_sdl=0.0,
    normaliser="tokens",
    imitation_weight=0.0,
    context="none",
    teacher="none",
    student_prompt="plain",
    sampler="student",
    description="Group-relative policy optimisation on the reward alone.",
)
_SKILL_SD = replace(
    _GRPO,
    name="skill-sd",
    lambda_sdl=0.001,  # the paper's, for its 4B model
    context="skill",
    teacher="synchronised",
    description="GRPO plus distillation; the teacher is the student with a skill in its prompt.",
)
_OPD = replace(
    _SKILL_SD,
    name="opd",
    reward_weight=0.0,
    lambda_sdl=1.0,
    normaliser="taught",
    description="Distillation only; the teacher is the student with a skill in its prompt.",
)
_OPSD = replace(
    _OPD,
    name="opsd",
    context="oracle",
    teacher="frozen",
    description="Distillation only; a frozen teacher with the reference solution in its prompt.",
)
_GRPO_OPSD = replace(
    _OPSD,
    name="grpo-opsd",
    reward_weight=1.0,
    lambda_sdl=0.001,
    normaliser="tokens",
    description="GRPO plus OPSD: a frozen teacher with the reference solution in its prompt.",
)
_ROWS = (
    _GRPO,
    _SKILL_SD,
    replace(
        _GRPO,
        name="skill-grpo",
        student_prompt="skill",
        description="Skill-augmented GRPO: a skill in the student's prompt in training, but not at test time.",
    ),
    _OPD,
    replace(
        _OPD,
        name="opd-external",
        context="none",
        teacher="external",
        description="Distillation only; the teacher is another model (teacher.model) under the plain prompt.",
    ),
    _OPSD,
    _GRPO_OPSD,
    replace(
        _GRPO_OPSD,
        name="grpo-opsd-synchronised",
        teacher="synchronised",
        description="GRPO plus distillation; the teacher is the student with the reference solution in its prompt.",
    ),
    replace(
        _SKILL_SD,
        name="skill-sd-frozen",
        teacher="frozen",
        description="Skill-SD with a frozen teacher (an ablation in the paper).",
    ),
    replace(
        _SKILL_SD,
        name="teacher-rollouts",
        sampler="teacher",
        description="Skill-SD on rollouts of the synchronised teacher (an ablation in the paper).",
    ),
    replace(
        _SKILL_SD,
        name="teacher-rollouts-frozen",
        teacher="frozen",
        sampler="teacher",
        description="Skill-SD on rollouts of a frozen teacher (an ablation in the paper).",
    ),
    replace(
        _GRPO,
        name="grpo-imitation",
        imitation_weight=0.1,
        description="GRPO plus imitation of its own best success on the task; no skill, no teacher (a control).",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def methods_table(methods: Iterable[Method] | None = None) -> str:
    """Names and switches as an aligned Markdown table."""
    training = ["reward", "lambda", "over", "imitation"]
    rows = [["method", *training, "teacher's context", "teacher", "student's prompt", "sampler"]]
    for m in METHODS.values() if methods is None else methods:
        reward, weight, imitation = (f"{weight:g}" for weight in (m.reward_weight, m.lambda_sdl, m.imitation_weight))
        over = "none" if m.teacher == "none" else m.normaliser
        rows.append([m.name, reward, weight, over, imitation, m.context, m.teacher, m.student_prompt, m.sampler])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
