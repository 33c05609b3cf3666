"""The keys of a recipe about skills: who writes them, which one the teacher gets, what it earns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from skillsd.engines.endpoint_options import EndpointOptions
from skillsd.options import NameOrPath, Options

SUMMARISERS = ("rules", "openai", "policy")
PICKING_RULES = ("ucb", "best", "random", "last")


class SkillsSection(Options):
    """The skill bank and the teacher's context."""

    summariser: Annotated[str, NameOrPath("summariser", SUMMARISERS)] = "rules"
    """Who writes the skills. ``rules``: the environment's own, without a language model; ``openai``: any endpoint that
    speaks OpenAI's chat completions; ``policy``: the student itself; or ``module:Class`` of your own. The section
    ``summariser`` configures all but ``rules``."""
    sources: Literal["all", "successes", "failures"] = "all"
    """Which trajectories are summarised. The paper's: all."""
    hindsight: bool = False
    """Summarise a group before its own update, so that its skills can teach it; the paper's teach later visits."""
    content: Literal["own", "shuffled", "empty"] = "own"
    """What the teacher's context holds instead of the picked skill: that skill (``own``), another task's
    (``shuffled``), or nothing (``empty``). The last two are controls: does it matter what a skill says?"""
    credit: Literal["reward", "source", "uplift"] = "reward"
    """What a used skill is credited with: the rewards of the rollouts it taught (the paper's), the reward of the
    trajectory it was written from, or its measured uplift, which costs `uplift_episodes`."""
    uplift_episodes: int = Field(4, ge=1)
    """Episodes with the skill in the student's prompt that measure its uplift; nothing is trained on them, but they
    count as episodes."""
    pick: Annotated[str, NameOrPath("picking rule", PICKING_RULES)] = "ucb"
    """Which of a task's skills the teacher gets: ``ucb``, ``best`` (UCB without exploration: the highest mean reward;
    for a skill that was never used its source's), ``random``, ``last`` (the newest, so no bank at all), or
    ``module:Class`` of your own."""
    ucb_c: float = Field(1.0, ge=0)
    """Exploration constant c of UCB. Not given in the paper; 1 suits rewards in [0, 1]."""
    max_per_task: int | None = Field(None, ge=1)
    """The most skills kept per task (skills that were never tried don't count); None keeps all."""
    template: str = "teacher"
    """How a skill is worded in the teacher's prompt: a template of the package, or a path to one.

    The paper's prompts are not given; these are ours."""
    teacher_extra_tokens: int = Field(512, ge=1)
    """The most tokens a skill may add to the teacher's prompt. A longer one is skipped and counted, never cut."""
    max_chars: int = Field(4000, ge=1)
    """A skill with a longer field is refused when it is written."""
    deterministic: bool = True
    """Wait for all summaries at the iteration's end. False: late ones serve a later iteration."""
    concurrency: int = Field(16, ge=1)
    """The most summaries that are written at once."""
    timeout_seconds: float = Field(120.0, gt=0)
    """Deadline of one summary, retries and the pauses between them included."""


class SummariserSection(EndpointOptions):
    """The language model that writes skills, for ``skills.summariser`` ``openai`` and ``policy``. docs/summarisers.md.

    With ``policy`` only the prompt, the temperature and the limits apply.
    """

    prompt: str = "summarise"
    """The summariser's prompt: a template of the package, or a path to one. The paper's is not given; this is ours."""
    temperature: float | None = Field(None, ge=0)
    """None takes the endpoint's own; for the policy, ``rollout.temperature``."""
    max_input_chars: int = Field(24_000, ge=1000)
    """A longer prompt is condensed (`skillsd.skills.summary_prompt`). The policy's must also fit its context."""
    max_output_tokens: int = Field(1024, ge=1)
    """The most tokens of an answer, a reasoning model's thinking included."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a summariser of your own (``skills.summariser: module:Class``)."""
