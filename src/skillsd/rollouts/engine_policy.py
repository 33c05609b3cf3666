"""A policy on an engine: token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass

from skillsd.engines.base import Engine, SampleRequest, Weights
from skillsd.errors import UserError
from skillsd.prompting.renderer import ChatRenderer
from skillsd.rollouts.policy import Budget, EpisodeState, PolicyFailedError
from skillsd.seeds import derive_seed
from skillsd.types import Message


@dataclass(frozen=True)
class EnginePolicy:
    """Samples from an engine's student (or teacher) at a temperature; 0 is greedy."""

    engine: Engine
    renderer: ChatRenderer
    temperature: float = 1.0
    weights: Weights = "student"

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> TokenEpisode:
        try:
            return TokenEpisode(self, prompt, budget, seed=seed, session=session, context=context)
        except UserError as error:  # the chat template refuses the roles of this task's prompt
            raise PolicyFailedError(str(error)) from error


class TokenEpisode(EpisodeState):
    """Token ids are only appended; sampled ids are kept exactly as they were sampled."""

    def __init__(
        self,
        policy: EnginePolicy,
        prompt: tuple[Message, ...],
        budget: Budget,
        *,
        seed: int,
        session: str,
        context: str,
    ) -> None:
        super().__init__()
        self._policy, self._budget, self._seed, self._session = policy, budget, seed, session
        self._sampler = policy.engine.sampler_of(policy.weights)
        self._append(policy.renderer.prompt(prompt, context), None)
        self.prompt_length = len(self.tokens)
        self._max_tokens = budget.trajectory_tokens
        if context:  # the context's tokens come on top of the budget
            extra = self.prompt_length - len(policy.renderer.prompt(prompt))
            self._max_tokens = min(self._max_tokens + extra, self._sampler.max_length, policy.engine.max_length)
        self._observation: tuple[int, ...] = ()  # appended to the tokens only if another turn follows
        self._called = False  # whether the last reply called tools

    async def act(self, turn: int) -> str | None:
        room = min(self._budget.turn_tokens, self._max_tokens - len(self.tokens) - len(self._observation))
        if room <= 0:
            return None
        self._append(self._observation, None)
        sample = await self._sampler.sample(
            SampleRequest(
                tokens=tuple(self.tokens),
                max_tokens=room,
                seed=derive_seed(self._seed, turn),
                temperature=self._policy.temperature,
                session=self._session,
                weights=self._policy.weights,
            )
        )
        oldest, newest = self.versions or (sample.version, sample.version)
        self.versions = (min(oldest, sample.version), max(newest, sample.version))
        action, self._called = self._policy.renderer.action(sample.tokens, self.tokens)
        start = len(self.tokens)
        self._append(sample.tokens, sample.logprobs)
        self.action_span = (start, len(self.tokens))
        return action

    def observe(self, observation: str) -> None:
        try:
            renderer, last = self._policy.renderer, self.tokens[-1]
            self._observation = renderer.observation(observation, last, answers_calls=self._called)
        except UserError as error:  # the chat template writes this observation in another way
            raise PolicyFailedError(str(error)) from error

    def end(self) -> None:
        self._sampler.end_session(self._session)

    def _append(self, ids: tuple[int, ...], logprobs: tuple[float, ...] | None) -> None:
        self.tokens.extend(ids)
        self.mask.extend([logprobs is not None] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))
