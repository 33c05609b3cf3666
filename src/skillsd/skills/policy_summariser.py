"""The policy as its own summariser: the student reads its own episode and writes the skill.

Engines refuse to sample while their weights change, so this needs ``skills.deterministic``: the loop then waits for
all summaries right after submitting them.
"""

from __future__ import annotations

from collections import Counter

from skillsd.engines.base import Engine, SampleRequest
from skillsd.errors import UserError
from skillsd.prompting.renderer import ChatRenderer
from skillsd.seeds import derive_seed
from skillsd.skills.summary_prompt import SummaryPrompt, parse_skill
from skillsd.types import Message, Skill, Trajectory


class PolicySummariser:
    """Has the student write each skill. A skill depends only on the weights, the episode and `seed`.

    Args:
        max_output_tokens: maximum length of an answer. The rest of the model's context is for the episode, which is
            condensed if it is longer.
        counts: gets ``calls``, ``tokens_in``, ``tokens_out`` and ``condensed``.

    Raises:
        UserError: if the model's context is too short for the bare prompt and an answer.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: ChatRenderer,
        prompt: SummaryPrompt,
        *,
        max_output_tokens: int,
        temperature: float,
        seed: int,
        counts: Counter[str],
    ) -> None:
        self._sampler, self._renderer, self._prompt, self._counts = engine.sampler, renderer, prompt, counts
        self._max_output_tokens, self._temperature, self._seed = max_output_tokens, temperature, seed
        if not self._fits(prompt.frame()):
            frame = len(self._tokens(prompt.frame()))
            raise UserError(
                f"skills.summariser is 'policy', but the model takes {engine.sampler.max_length} tokens: too few for "
                f"summariser.max_output_tokens ({max_output_tokens}) and the {frame} tokens of summariser.prompt "
                "without an episode. Lower the first, shorten the second, or use another summariser"
            )

    async def summarise(self, trajectory: Trajectory) -> Skill:
        text, condensed = self._prompt.render(trajectory, self._fits)
        tokens = self._tokens(text)
        if condensed:
            self._counts["condensed"] += 1
        self._counts["calls"] += 1
        sample = await self._sampler.sample(
            SampleRequest(
                tokens,
                max_tokens=self._max_output_tokens,
                seed=derive_seed(self._seed, "summary", trajectory.task.id, trajectory.seed),
                temperature=self._temperature,
            )
        )
        self._counts["tokens_in"] += len(tokens)
        self._counts["tokens_out"] += len(sample.tokens)
        return parse_skill(self._renderer.text(sample.tokens), cut=sample.stop_reason == "length")

    def _tokens(self, text: str) -> tuple[int, ...]:
        return self._renderer.prompt([Message("user", text)])

    def _fits(self, text: str) -> bool:
        return len(self._tokens(text)) + self._max_output_tokens <= self._sampler.max_length
