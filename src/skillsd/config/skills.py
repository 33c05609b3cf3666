"""The keys about skills: how they are written, selected and credited."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.options import NameOrPath, Options

SUMMARISERS = ("rules", "openai", "policy")
PICKING_RULES = ("ucb", "ucb-prior", "best", "random", "last")


class SkillsSection(Options):
    """The skill bank, and the skill in the teacher's context."""

    summariser: Annotated[str, NameOrPath("summariser", SUMMARISERS)] = "rules"
    """How skills are written. ``rules``: by the environment's rules, without a language model. ``openai``: by a model
    behind an OpenAI-compatible endpoint. ``policy``: by the student. ``module:Class``: your own. All but ``rules`` are
    configured in the section ``summariser``."""
    sources: Literal["all", "successes", "failures"] = "all"
    """Which trajectories are summarised into skills. The paper's: all."""
    per_group: int | None = Field(None, ge=1)
    """Maximum trajectories of a group that are summarised: those with the highest reward, the first ones among equals.
    Default: all of them, as in the paper, of which UCB then tries few more than once."""
    hindsight: bool = False
    """Summarise a group before its own update, so that the update can use its skills. The paper's: false."""
    content: Literal["own", "shuffled", "empty"] = "own"
    """Content of the teacher's context: the selected skill (``own``), another task's skill (``shuffled``), or nothing
    (``empty``). The last two are controls for whether a skill's content matters."""
    credit: Literal["reward", "source", "change", "uplift"] = "reward"
    """What a used skill is credited with: the rewards of the rollouts it was used for (``reward``, the paper's; they
    were sampled before it taught anything), the reward of the trajectory it was written from (``source``), the change
    of the task's mean reward by its next visit (``change``), or its measured uplift (``uplift``, which costs
    ``uplift_episodes``)."""
    uplift_episodes: int = Field(4, ge=1)
    """Episodes with the skill in the student's prompt, to measure its uplift. They are not trained on, but count
    towards the episode budget."""
    pick: Annotated[str, NameOrPath("picking rule", PICKING_RULES)] = "ucb"
    """How one of a task's skills is selected: ``ucb`` (the paper's), ``ucb-prior`` (UCB that counts the source
    trajectory's reward as a first pick, so that a new skill does not always come first), ``best`` (UCB without
    exploration: the highest mean reward, or the source trajectory's reward for an unused skill), ``random``, ``last``
    (the newest; a baseline without a bank), or ``module:Class`` for your own."""
    ucb_c: float = Field(math.sqrt(2), ge=0)
    """Exploration constant c of UCB, for rewards in [0, 1]. Not given in the paper; sqrt 2 is second hand."""
    max_per_task: int | None = Field(None, ge=1)
    """Maximum skills kept per task, not counting unused ones. Default: all are kept."""
    template: str = "teacher"
    """Prompt template for a skill: one of the package's, or a path. Not given in the paper."""
    place: Literal["before", "after"] = "before"
    """Where the skill or the reference solution stands in the prompt's last user message: before the task (the
    paper's), or after it. A warm-started model needs the place it was trained with, ``warm_start.place``."""
    teacher_extra_tokens: int = Field(512, ge=1)
    """Maximum tokens that a skill may add to the prompt. Longer skills are skipped and counted, not truncated."""
    max_chars: int = Field(4000, ge=1)
    """Maximum characters per field of a skill. Longer skills are rejected when they are written."""
    deterministic: bool = True
    """Wait for all summaries at the end of an iteration. If false, late ones become available in a later iteration."""
    concurrency: int = Field(16, ge=1)
    """Maximum number of concurrent summaries."""
    timeout_seconds: float = Field(120.0, gt=0)
    """Timeout of one summary, including retries and the pauses between them."""


class SummariserSection(EndpointOptions):
    """The language model that writes skills. See docs/summarisers.md.

    With ``skills.summariser`` ``openai`` all keys but ``options`` apply; with ``policy`` only the prompt, the
    temperature and the limits; with your own only ``options``.
    """

    prompt: str = "summarise"
    """The summariser's prompt template: one of the package's, or a path. Not given in the paper."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature. Default: the endpoint's own, or ``rollout.temperature`` for the policy."""
    max_input_chars: int = Field(24_000, ge=1000)
    """Maximum characters of the prompt; longer episodes are condensed. The policy's must also fit its context."""
    max_output_tokens: int = Field(1024, ge=1)
    """Maximum tokens of an answer, including a reasoning model's thinking."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for your own summariser (``skills.summariser: module:Class``)."""
