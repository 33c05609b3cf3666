"""Tries code of the user's own on made-up values before a run starts, so that its faults don't cost an iteration."""

from __future__ import annotations

import torch

from skillsd.engines.top_k import select
from skillsd.objective import ACTION_MASK, IMITATION_MASK, TEACHER_MASK, Objective
from skillsd.objective.logprobs import TokenLogprobs, top_k
from skillsd.skills import ucb
from skillsd.skills.bank import StoredSkill
from skillsd.types import Outcome, Skill
from skillsd.user_code import blamed

TOKENS, VOCABULARY = 5, 8


def try_objective(objective: Objective) -> None:
    """Compute the loss and its gradient of a made-up batch.

    Raises:
        UserError: if an estimator or a loss term raises, or returns something else than losses per token.
    """
    generator = torch.Generator().manual_seed(0)
    want = top_k(min(objective.want.k, VOCABULARY - 1)) if objective.want.k else objective.want
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    def logprobs() -> TokenLogprobs:
        logits = torch.randn(TOKENS, VOCABULARY, generator=generator, requires_grad=True)
        return select(logits.log_softmax(-1), tokens, want)

    student, teacher = logprobs(), logprobs()
    signals = {
        "old_logprobs": student.chosen.detach() - 0.1,
        "rescored_logprobs": student.chosen.detach() - 0.1,
        "advantages": torch.linspace(-1, 1, TOKENS),
        "teacher_logprobs": teacher.chosen.detach(),
        **{mask: torch.ones(TOKENS, dtype=torch.bool) for mask in (ACTION_MASK, TEACHER_MASK, IMITATION_MASK)},
    }
    for name, value in (("teacher_distribution", teacher.distribution), ("candidates", teacher.candidates)):
        if value is not None:
            signals[name] = value.detach()
    with blamed("the objective"):
        loss, _ = objective.template.bind([signals])(student, signals)
        loss.backward()


def try_rule(rule: ucb.PickingRule, c: float) -> None:
    """Let a picking rule choose among one and three made-up skills.

    Raises:
        UserError: if it raises, or returns anything but an index or None.
    """
    skills = [
        StoredSkill(
            id=number,
            env="made-up",
            task_id="made-up",
            skill=Skill("", "", f"step {number}"),
            source=f"iteration-{number}/made-up/0",
            iteration=number,
            source_reward=0.5,
            source_outcome=Outcome.FAILED,
            picks=number - 1,
            credited=2 * (number - 1),
            reward_sum=0.5 * (number - 1),
        )
        for number in (1, 2, 3)
    ]
    for arms in (skills[:1], skills):
        ucb.choose(rule, arms, c)
