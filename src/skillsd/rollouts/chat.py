"""An actor that speaks messages: a model behind an endpoint, whose token ids nobody here knows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from skillsd.endpoint import Answer, Endpoint, EndpointError
from skillsd.errors import UserError
from skillsd.rollouts.episode import ActorFailedError, Budget, Part
from skillsd.skills.context import with_context
from skillsd.types import Message

log = logging.getLogger(__name__)

IN_A_ROW = 8
"""So many requests (each with all its retries) that came to nothing one after the other: the endpoint is gone."""


@dataclass
class ChatActor:
    """A `skillsd.rollouts.episode.Player` behind an endpoint.

    What may pass (a missed deadline, 5xx, a broken connection) costs the episode, which is then played again. What will
    not (a refused key, an unknown model, a spent budget, an endpoint that is not there) ends everything: UserError.

    Budgets are held as far as the endpoint counts: `Budget.turn_tokens` limits an answer, and the tokens of the last
    request and its answer are held against `Budget.trajectory_tokens`. Messages that the model's own context does not
    hold end the episode in the same way.
    """

    endpoint: Endpoint
    temperature: float = 1.0
    _answered: bool = field(default=False, init=False)
    _failed: int = field(default=0, init=False)  # in a row

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> ChatPart:
        return ChatPart(self, with_context(prompt, context) if context else prompt, budget)

    async def ask(self, messages: list[Message], max_tokens: int) -> Answer | None:
        """The model's answer; None where the messages are too long for it."""
        try:
            answer = await self.endpoint.ask(messages, max_tokens=max_tokens, temperature=self.temperature)
        except EndpointError as error:
            if error.too_long:
                return None
            self._failed += 1
            passes = error.may_pass or error.reason in ("failed_http_400", "failed_http_422")  # it may be these words
            if not passes or not self._answered or self._failed >= IN_A_ROW:
                raise UserError(str(error)) from None
            log.info("an episode is lost: %s", error)
            raise ActorFailedError(str(error)) from None
        self._answered, self._failed = True, 0
        return answer


class ChatPart(Part):
    """One dialogue, which is sent whole every turn."""

    def __init__(self, actor: ChatActor, prompt: tuple[Message, ...], budget: Budget) -> None:
        super().__init__()
        self._actor, self._budget = actor, budget
        self._messages = list(prompt)
        self._used = 0  # tokens of the dialogue, as the endpoint last counted them

    async def act(self, number: int) -> str | None:
        room = min(self._budget.turn_tokens, self._budget.trajectory_tokens - self._used)
        answer = await self._actor.ask(self._messages, room) if room > 0 else None
        if answer is None:
            return None
        self._used = answer.tokens_in + answer.tokens_out
        self._messages.append(Message("assistant", answer.text))
        return answer.text.strip()

    def hear(self, observation: str) -> None:
        self._messages.append(Message("user", observation))
