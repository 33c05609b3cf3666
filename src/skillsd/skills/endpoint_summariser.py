"""A summariser behind an endpoint with OpenAI's chat completions API (`skillsd.engines.endpoint`).

The answer is constrained by the skill's JSON schema if the server supports it, and validated in any case.
"""

from __future__ import annotations

from collections import Counter

from skillsd.config import SummariserSection
from skillsd.engines.endpoint import Endpoint, EndpointError
from skillsd.skills.summarise import SkillSchema, SummaryError
from skillsd.skills.summary_prompt import SummaryPrompt, parse_skill
from skillsd.types import Message, Skill, Trajectory

RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "skill", "strict": True, "schema": SkillSchema.model_json_schema()},
}
NAMES = {key: f"summariser.{key}" for key in SummariserSection.model_fields}


class EndpointSummariser:
    """Has a language model behind an endpoint write each skill.

    Args:
        options: the recipe's section ``summariser``, with a model's name.
        counts: as in `skillsd.engines.endpoint.Endpoint`, and ``condensed`` (episodes).

    Raises:
        UserError: if the package openai or the key is missing.
    """

    def __init__(self, options: SummariserSection, prompt: SummaryPrompt, counts: Counter[str]) -> None:
        self._endpoint = Endpoint(options, counts, NAMES)
        self._options, self._prompt, self._counts = options, prompt, counts

    async def summarise(self, trajectory: Trajectory) -> Skill:
        try:
            self._endpoint.check_budget()
            text, condensed = self._prompt.render(trajectory)
            if condensed:
                self._counts["condensed"] += 1
            answer = await self._endpoint.ask(
                [Message("user", text)],
                max_tokens=self._options.max_output_tokens,
                temperature=self._options.temperature,
                schema=RESPONSE_FORMAT,
            )
        except EndpointError as error:
            raise SummaryError(error.reason, str(error)) from None
        return parse_skill(answer.text, cut=answer.cut)
