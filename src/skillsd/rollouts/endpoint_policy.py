"""A policy behind an endpoint: it exchanges messages, and its token ids are unknown."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

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
    _longest: int = field(default=0, init=False)  # characters of the longest dialogue that was accepted
    _warned: bool = field(default=False, init=False)

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> EndpointEpisode:
        return EndpointEpisode(self, with_context(prompt, context, self.place) if context else prompt, budget)

    async def ask(self, messages: list[Message], max_tokens: int) -> Answer | None:
        """The model's answer; None if the messages are too long for it."""
        try:
            answer = await self._ask(messages, max_tokens)
        except EndpointError as error:
            too_long = error.too_long or await self._accepts_less(error, messages, max_tokens)
            if too_long and self._answered:
                self._failures = 0
                return None
            self._failures += 1
            if too_long:
                if self._failures < MAX_CONSECUTIVE_FAILURES:
                    return None
                raise UserError(f"the first {self._failures} prompts are too long for the model. {error}") from None
            # A 400 or 422 may be caused by these particular messages.
            transient = error.transient or error.status in (400, 422)
            if not transient or not self._answered or self._failures >= MAX_CONSECUTIVE_FAILURES:
                raise UserError(str(error)) from None
            log.info("episode lost: %s", error)
            raise PolicyFailedError(str(error)) from None
        self._answered, self._failures = True, 0
        self._longest = max(self._longest, _characters(messages))
        return answer

    async def _ask(self, messages: list[Message], max_tokens: int) -> Answer:
        return await self.endpoint.ask(messages, max_tokens=max_tokens, temperature=self.temperature)

    async def _accepts_less(self, error: EndpointError, messages: list[Message], max_tokens: int) -> bool:
        """Whether a dialogue was refused for its length, which servers report in many words and few codes.

        The server is asked again, with the same messages at half the length that it has accepted before, the newest
        text in full if possible. If it accepts that, neither the new text nor the request's form was the reason.
        """
        size = _characters(messages)
        if error.status not in (400, 422, 500) or 2 * size < self._longest:
            return False
        room = min(size, self._longest) // 2 if self._longest else size // 8
        if not await self._accepts(shortened(messages, room), max_tokens):
            return False
        # After a 500, the server may have recovered in the meantime.
        return error.status != 500 or not await self._accepts(messages, max_tokens)

    async def _accepts(self, messages: list[Message], max_tokens: int) -> bool:
        try:
            await self._ask(messages, max_tokens)
        except EndpointError as error:
            if error.reason == "skipped_budget":
                raise UserError(str(error)) from None
            return False
        return True

    def note_cut_dialogue(self) -> None:
        """Warn, once, that the server seems to drop the beginning of long dialogues."""
        if not self._warned:
            self._warned = True
            log.warning(
                "%s counts fewer tokens for a dialogue than for its beginning. It may drop the first messages once a "
                "dialogue exceeds its context (Ollama does: set OLLAMA_CONTEXT_LENGTH), or not count cached ones",
                self.endpoint.address,
            )


def _characters(messages: list[Message]) -> int:
    return sum(len(message.content) for message in messages)


def shortened(messages: list[Message], room: int) -> list[Message]:
    """As many messages of the same roles, with about `room` characters: at least one each, and up to three quarters of
    the room for the end of the last one."""
    *earlier, last = messages
    end = last.content[-max(1, 3 * room // 4) :]
    share = max(0, room - len(end)) / max(1, _characters(earlier))
    cut = [
        replace(message, content=message.content[: max(1, int(share * len(message.content)))]) for message in earlier
    ]
    return [*cut, replace(last, content=end)]


class EndpointEpisode(EpisodeState):
    """One dialogue, sent in full every turn."""

    def __init__(self, policy: EndpointPolicy, prompt: tuple[Message, ...], budget: Budget) -> None:
        super().__init__()
        self._policy, self._budget = policy, budget
        self._messages = list(prompt)
        self._prompt = 0  # tokens of the last request, as the endpoint counted them
        self._used = 0  # with its answer

    async def act(self, turn: int) -> str | None:
        room = min(self._budget.turn_tokens, self._budget.trajectory_tokens - self._used)
        answer = await self._policy.ask(self._messages, room) if room > 0 else None
        if answer is None:
            return None
        if answer.tokens_in < self._prompt:
            self._policy.note_cut_dialogue()
        self._prompt, self._used = answer.tokens_in, answer.tokens_in + answer.tokens_out
        # Anthropic's and Mistral's servers refuse empty messages.
        self._messages.append(Message("assistant", answer.text if answer.text.strip() else "(no answer)"))
        return without_thinking(answer.text).strip()

    def observe(self, observation: str) -> None:
        self._messages.append(Message("user", observation))
