"""The environment of the text games, and what their task sets have in common."""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from skillsd.envs import hosts
from skillsd.envs.base import Environment, Step, TaskSet, play_through
from skillsd.envs.textgames import demonstrations, prompt, summarise
from skillsd.envs.textgames.engine import Engine, pool
from skillsd.envs.textgames.prompt import Style
from skillsd.errors import UserError, unknown_name
from skillsd.types import TRAIN_SPLIT, Demonstration, Message, Skill, Task, Trajectory

_STATE: hosts.Kinds = {"text": str, "score": (int, float), "success": bool, "done": bool, "place": str}


class TextGame(Environment):
    """Runs one episode at a time, each in a session of its own."""

    def __init__(self, task_set: TextGames) -> None:
        self._set = task_set
        self._session: hosts.Session | None = None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Start the task's game. It is deterministic: the seed is unused.

        Raises:
            HostBrokenError: if that fails; the collector retries.
        """
        await self.close()
        games, opening = self._set, self._set.opening(task)
        self._session = await games.pool().connect(hosts.Session)
        self._state = await self._session.ask("open", games.call_seconds, {"task": str, **_STATE}, **opening)
        self._done = False
        text = self._shown(self._state)
        return prompt.first_prompt(games.style, self._state["task"], text, games.commands, games.max_turns)

    async def step(self, action: str) -> Step:
        """Send the action's command to the game.

        ``info`` has the command (None if there was none), the score before and after it, whether the game refused it,
        hashes of what the agent saw and carried before and after it, whether the game has ended, and the first words of
        its answer.
        """
        if self._session is None or self._done:
            raise RuntimeError("step() before reset(), or after the episode's end")
        before, given = self._state, prompt.command_of(self._set.style, action)
        command = None if isinstance(given, prompt.Refused) else given
        if isinstance(given, prompt.Refused):
            text, refused = given.reason, True
        else:
            self._state = await self._session.ask("step", self._set.call_seconds, _STATE, command=given)
            text = self._shown(self._state)
            refused = self._set.refused(given, self._state["text"], before, self._state)
        success, score = self._state["success"], self._state["score"]
        self._done = success or self._state["done"]
        reward = 1.0 if success else min(max(score, 0.0), 1.0)
        info = {"command": command, "before": before["score"], "score": score, "refused": refused}
        answer = " ".join(self._state["text"].split())[: summarise.MAX_ANSWER_CHARS] if command else ""
        info |= {"places": [before["place"], self._state["place"]], "ended": self._done, "answer": answer}
        return Step(text or "Nothing happens.", self._done, reward, success, info)

    @property
    def valid_commands(self) -> Sequence[str]:
        """The commands that the game lists as possible now."""
        commands: Sequence[str] = self._state["commands"]
        return commands

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _shown(self, state: Mapping[str, Any]) -> str:
        return prompt.observation(self._set.style, state["text"], self._set.max_observation_chars)


class TextGames(TaskSet):
    """Text games on an engine of their own.

    Args:
        style: prompt style; see `skillsd.envs.textgames.prompt`.
        max_turns: maximum number of commands in an episode.
        max_observation_chars: longer texts are cut, with a note.
        hosts: number of host processes; default: one per core, at most four.
        call_seconds: wall-clock limit of one call to the engine, in which other episodes of its host may come first.

    Raises:
        UserError: for an invalid value.
    """

    engine: ClassVar[Engine]
    commands: ClassVar[str]
    """Which commands there are, for the prompt."""
    lists_commands: ClassVar[bool] = True
    """Whether the engine lists the commands that are possible (`TextGame.valid_commands`)."""

    def __init__(
        self, style: str, max_turns: int, max_observation_chars: int, hosts: int | None, call_seconds: float
    ) -> None:
        if style not in prompt.STYLES:
            raise unknown_name(f"prompt style of {self.name!r}", str(style), prompt.STYLES)
        self.style: Style = style  # type: ignore[assignment]
        self._max_turns = self.checked("max_turns", max_turns)
        self.max_observation_chars = self.checked("max_observation_chars", max_observation_chars, 100)
        self._hosts = min(4, os.cpu_count() or 1) if hosts is None else self.checked("hosts", hosts)
        if not isinstance(call_seconds, (int, float)) or isinstance(call_seconds, bool) or call_seconds <= 0:
            raise UserError(f"{self.name} option call_seconds is {call_seconds!r}; expected a number of seconds")
        self.call_seconds = float(call_seconds)

    def checked(self, option: str, value: object, least: int = 1) -> int:
        """The value of an option that is a whole number.

        Raises:
            UserError: if it isn't one, or less than `least`.
        """
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{self.name} option {option} is {value!r}; expected a whole number, at least {least}")
        return value

    @property
    def splits(self) -> tuple[str, ...]:
        """The engine's own folds."""
        return ("train", "dev", "test")

    @property
    def max_turns(self) -> int:
        return self._max_turns

    @property
    def slowest_call(self) -> float:
        return self.call_seconds

    @abstractmethod
    def opening(self, task: Task) -> Mapping[str, Any]:
        """The arguments of the engine's request ``open``."""

    @abstractmethod
    def gold(self, task: Task) -> Sequence[str]:
        """The commands of the engine's own solution.

        Raises:
            UserError: if the engine is not set up or fails.
        """

    @abstractmethod
    def refused(self, command: str, text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Whether the game refused a command, judged by its answer and the states before and after it."""

    def demonstration_tasks(self, seed: int) -> Iterator[Task]:
        """The tasks of the demonstrations, infinitely: the training tasks, in another order each time."""
        return demonstrations.shuffled(self.tasks(TRAIN_SPLIT), seed)

    def pool(self) -> hosts.Pool:
        """The host processes.

        Raises:
            UserError: if the engine is not installed.
        """
        return pool(self.engine, self._hosts)

    def check_machine(self) -> None:
        """See `TaskSet.check_machine`.

        Raises:
            UserError: if the engine is not installed.
        """
        self.engine.venv.python()

    def make(self) -> TextGame:
        self.check_machine()
        return TextGame(self)

    def rules_in_words(self) -> Mapping[str, Any]:
        sample = prompt.first_prompt(self.style, "Task.", "Text.", self.commands, self.max_turns)
        return {
            "engine": self.engine.venv.title,
            "style": self.style,
            "max_observation_chars": self.max_observation_chars,
            "wording": [message.content for message in sample],
        }

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """The rule-based summariser: commands that scored, commands that were refused, and the way to the end."""
        return summarise.summariser(self.style)

    def oracle(self, task: Task) -> str:
        """The engine's own solution, as in a skill's golden workflow."""
        return summarise.workflow(self.gold(task), self.style)

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """Episodes with and without a skill; see `skillsd.envs.textgames.demonstrations.Options`.

        Raises:
            UserError: for a split other than ``train``, an unknown option or an invalid value.
        """
        if split != TRAIN_SPLIT:
            raise UserError(f"demonstrations are for the split {TRAIN_SPLIT!r} only; got {split!r}")
        return demonstrations.demonstrate(self, seed, options)

    async def play(self, task: Task, actions: Sequence[str]) -> list[Step]:
        """Play a fixed list of actions, until they or the episode end."""
        return await play_through(self.make(), task, actions)

    def played(self, task: Task, commands: Sequence[str]) -> list[Step]:
        """Play commands, without an event loop."""
        return asyncio.run(self.play(task, [prompt.written(self.style, command) for command in commands]))
