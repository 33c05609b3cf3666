"""A policy behind an endpoint: it exchanges messages, and its token ids are unknown."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from skillsd.engines.endpoint import Answer, Endpoint, EndpointError
from skillsd.errors import UserError
from skillsd.prompting.templates import Place, with_context
from skillsd.prompting.thinking import without_thinking
from skillsd.rollouts.policy import Budget, EpisodeState, PolicyFailedError
from skillsd.types import Message

log = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 8
"""Failed requests in a row, each with all its retries, after which the endpoint counts as down."""


@dataclass
class EndpointPolicy:
    """A model behind an endpoint.

    A transient failure (a timeout, 5xx, a broken connection) loses the episode, which is then played again. A permanent
    one (a refused key, an unknown model, a spent budget, an unreachable endpoint) stops everything with a UserError.

    Budgets are enforced by the endpoint's own token counts: `Budget.turn_tokens` limits each answer, and the tokens of
    the last request and its answer are compared with `Budget.trajectory_tokens`. A dialogue longer than the model's
    context ends the episode, like a spent budget.
    """

    endpoint: Endpoint
    temperature: float = 1.0
    place: Place = "before"
    _answered: bool = field(default=False, init=False)
    _failures: int = field(default=0, init=False)  # in a row

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> EndpointEpisode:
        return EndpointEpisode(self, with_context(prompt, context, self.place) if context else prompt, budget)

    async def ask(self, messages: list[Message], max_tokens: int) -> Answer | None:
        """The model's answer; None if the messages are too long for it."""
        try:
            answer = await self.endpoint.ask(messages, max_tokens=max_tokens, temperature=self.temperature)
        except EndpointError as error:
            if error.too_long:
                return None
            self._failures += 1
            # A 400 or 422 may be caused by these particular messages.
            transient = error.transient or error.reason in ("failed_http_400", "failed_http_422")
            if not transient or not self._answered or self._failures >= MAX_CONSECUTIVE_FAILURES:
                raise UserError(str(error)) from None
            log.info("episode lost: %s", error)
            raise PolicyFailedError(str(error)) from None
        self._answered, self._failures = True, 0
        return answer


class EndpointEpisode(EpisodeState):
    """One dialogue, sent in full every turn."""

    def __init__(self, policy: EndpointPolicy, prompt: tuple[Message, ...], budget: Budget) -> None:
        super().__init__()
        self._policy, self._budget = policy, budget
        self._messages = list(prompt)
        self._used = 0  # tokens of the dialogue, as the endpoint last counted them

    async def act(self, turn: int) -> str | None:
        room = min(self._budget.turn_tokens, self._budget.trajectory_tokens - self._used)
        answer = await self._policy.ask(self._messages, room) if room > 0 else None
        if answer is None:
            return None
        self._used = answer.tokens_in + answer.tokens_out
        self._messages.append(Message("assistant", answer.text))
        return without_thinking(answer.text).strip()

    def observe(self, observation: str) -> None:
        self._messages.append(Message("user", observation))
