"""Any environment behind an OpenEnv server as a task set. docs/openenv.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from skillsd.envs import values
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.envs.openenv import observations, task_list
from skillsd.envs.openenv import tools as tool_calls
from skillsd.envs.openenv.actions import Actions, NoActionError, actions_of, fields_of
from skillsd.envs.openenv.api import Api
from skillsd.envs.openenv.session import RefusedActionError, Session, SessionError, websockets
from skillsd.envs.tools import NoCallError, read_calls
from skillsd.errors import UserError, unknown_name
from skillsd.types import Message, Task, Tool

LARGEST_SEED = 2**31 - 1
"""Many environments seed generators that take no more."""

REWARDS = ("last", "sum")


class OpenEnvEnvironment(Environment):
    """Plays one episode at a time, each in a new session."""

    def __init__(self, task_set: OpenEnv) -> None:
        self._set = task_set
        self._session: Session | None = None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Open a session and reset it to the task. The seed is the task's, if it has one.

        Raises:
            SessionError: if the server can't be reached, is full, or fails. The collector retries.
        """
        await self.close()
        self._reward, self._session = 0.0, await Session.open(self._set.api.socket)
        data = {"seed": seed % (LARGEST_SEED + 1), **task.payload["reset"]}
        result = observations.result_of(await self._session.ask("reset", data))
        if result.done:
            raise SessionError("the server's reset says that the episode is over")
        return self._set.prompt(result.observation)

    async def step(self, action: str) -> Step:
        """Send the agent's action, or its calls of tools one after the other, until the episode is over.

        ``info`` has the server's reward and the observation (of the last call), without what the agent reads; for an
        action that is not valid, the error.
        """
        if self._session is None:
            raise RuntimeError("step() before reset()")
        texts = []
        try:
            for data in self._set.sent(action):
                result = observations.result_of(await self._session.ask("step", data))
                self._reward = self._set.total(self._reward, result.reward)
                text, rest = self._set.read(result.observation)
                texts.append(text)
                if result.done:
                    break
        except (NoActionError, NoCallError, RefusedActionError) as error:
            texts.append(f"Invalid action: {error}")
            share = self._set.share(self._reward, False)
            return Step("\n\n".join(texts), False, share, False, {"error": str(error)})
        success = result.done and self._set.succeeded(self._reward, result.observation)
        info = {"reward": result.reward, "observation": rest}
        return Step("\n\n".join(texts), result.done, self._set.share(self._reward, success), success, info)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class OpenEnv(TaskSet):
    """The tasks of an OpenEnv server.

    Args:
        url: the server, e.g. ``http://127.0.0.1:8000``.
        env: the environment's name on the server; default: the only one that it lists.
        splits: our splits by name. Each is the name of a split of the server; or ``{seeds: 0-199}``, resets with these
            seeds, for servers that list no tasks; further keys are sent with each reset (``{split: train, level: 2}``).
            Default: the server's splits.
        max_turns: maximum number of turns of an episode.
        action_field: field of the action that takes the agent's text; default: the only field, if it takes text.
            Otherwise the agent writes the whole action as JSON, and its schema is in the prompt.
        observation_field: field of the observation that the agent reads; default: the only one with text. Otherwise
            the agent reads the whole observation as JSON.
        instructions: text before the first observation, for servers that don't explain the task.
        reward: what the server's rewards are: ``last``, how much of the task is done so far, or ``sum``, increments.
        full_reward: the reward, or the sum, of an episode in which everything is done. Less than 0 counts as 0.
        success_field: field of the last observation that says whether the task is solved; default: it is solved if
            the episode ends with the full reward.

    Raises:
        UserError: for an invalid value. The server is not asked before its tasks are used.
    """

    name: ClassVar[str] = "openenv"

    def __init__(
        self,
        url: str | None = None,
        env: str | None = None,
        splits: Mapping[str, Any] | None = None,
        max_turns: int = 30,
        action_field: str | None = None,
        observation_field: str | None = None,
        instructions: str = "",
        reward: str = "last",
        full_reward: float = 1.0,
        success_field: str | None = None,
    ) -> None:
        if url is None:
            raise UserError("openenv needs environment.options.url, the address of an OpenEnv server (docs/openenv.md)")
        if reward not in REWARDS:
            raise unknown_name("value of the option reward", str(reward), REWARDS)
        try:
            self._max_turns = values.count(max_turns, "environment.options.max_turns")
            self._full = values.number(full_reward, "environment.options.full_reward")
            self._instructions = values.text(instructions, "environment.options.instructions")
        except values.InvalidError as error:
            raise UserError(str(error)) from None
        if self._full <= 0:
            raise UserError(f"environment.options.full_reward is {full_reward!r}: expected more than 0")
        self.api = Api(url)
        self._env, self._given_splits = env, None if splits is None else task_list.read(splits)
        self._action_field, self._observation_field, self._success_field = (
            action_field,
            observation_field,
            success_field,
        )
        self._sum = reward == "sum"

    # -- tasks --------------------------------------------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    @property
    def max_turns(self) -> int:
        return self._max_turns

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split; raises UserError for an unknown one, and if the server can't be reached."""
        if split not in self._splits:
            raise unknown_name(f"split of the server {self.api.url}", split, self._splits)
        return self._tasks[split]

    @cached_property
    def _splits(self) -> Mapping[str, task_list.Split]:
        if self._given_splits is not None:
            return self._given_splits
        names = self.api.splits(self.env)
        if not names:
            raise UserError(
                f"the server {self.api.url} lists no tasks of {self.env!r}: give seeds for its resets, e.g. "
                f"environment.options.splits='{task_list.EXAMPLE}'"
            )
        return {name: task_list.Split(name) for name in names}

    @cached_property
    def _tasks(self) -> Mapping[str, list[Task]]:
        found = {
            name: task_list.tasks(name, split, self.api, lambda: self.env, self.name)
            for name, split in self._splits.items()
        }
        task_list.distinct(found)
        return found

    @cached_property
    def env(self) -> str:
        """The environment's name on the server."""
        if self._env is not None:
            return self._env
        names = self.api.environments()
        if len(names) != 1:
            found = f"these environments: {', '.join(names)}" if names else "no names of environments"
            raise UserError(f"the server {self.api.url} lists {found}: give the name in environment.options.env")
        return names[0]

    def check_machine(self) -> None:
        """See `TaskSet.check_machine`.

        Raises:
            UserError: if the server can't be reached, or `websockets` is not installed.
        """
        self.api.schema()
        self.make()

    def make(self) -> Environment:
        websockets()
        _ = (
            self.tools,
            self.actions,
            self._field,
        )  # options that don't fit the server are a UserError, not a failed episode
        return OpenEnvEnvironment(self)

    def rules_in_words(self) -> Mapping[str, Any]:
        """The options, and the schemas of actions and observations, which may change with the server's version."""
        options = {"full_reward": self._full, "sum": self._sum, "instructions": self._instructions}
        options |= {"observation_field": self._observation_field, "success_field": self._success_field}
        actions = dataclasses.asdict(self.actions) if self.actions else None  # the tools are in the fingerprint anyway
        return options | {"actions": actions, "observations": self._observation_schema}

    # -- texts --------------------------------------------------------------------------------------------------

    @cached_property
    def _schemas(self) -> Mapping[str, Any]:
        return self.api.schema()

    @property
    def _observation_schema(self) -> Mapping[str, Any]:
        found = self._schemas.get("observation")
        return found if isinstance(found, dict) else {}

    @cached_property
    def tools(self) -> tuple[Tool, ...]:  # computed once
        """The tools of an environment of tools (MCP), which takes calls instead of actions."""
        return tool_calls.listed(self.api) if tool_calls.takes_calls(self._schemas["action"]) else ()

    @cached_property
    def actions(self) -> Actions | None:
        """How the agent writes an action; None: it calls tools."""
        return None if self.tools else actions_of(self._schemas["action"], self._action_field)

    def sent(self, action: str) -> list[dict[str, Any]]:
        """The actions for the server, at least one, in the agent's action; raises NoActionError or NoCallError."""
        if self.actions is not None:
            return [self.actions.parse(action)]
        return [tool_calls.action_of(call) for call in read_calls(action, self.tools)]

    @cached_property
    def _field(self) -> str | None:
        """The field that the agent reads; None: all of them."""
        fields = fields_of(self._observation_schema)
        for option, field in (("observation_field", self._observation_field), ("success_field", self._success_field)):
            if field is not None and field not in fields:
                raise unknown_name(f"field of the environment's observations (option {option})", field, fields)
        if self.tools and self._observation_field is None:
            return None
        return observations.text_field(self._observation_schema, self._observation_field)

    @cached_property
    def _first_field(self) -> str | None:
        """The same in the answer to a reset."""
        schema = self._schemas.get("reset_observation")
        return observations.text_field(schema, self._observation_field) if isinstance(schema, dict) else self._field

    def read(self, observation: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """What the agent reads of an observation, and the rest of it."""
        if self._field is None and "tool_name" in observation:
            rest = {name: value for name, value in observation.items() if name not in ("result", "error")}
            return tool_calls.result_text(observation), rest
        return observations.read(observation, self._field)

    def prompt(self, observation: Mapping[str, Any]) -> tuple[Message, ...]:
        """The first prompt: the messages of the observation if it has some, else its text."""
        text, _ = observations.read(observation, self._first_field)
        found = observations.messages(observation.get("messages")) or [Message("user", text)]
        before = "\n\n".join(filter(None, (self._instructions, self.actions.instructions if self.actions else "")))
        if before:
            first = next((place for place, message in enumerate(found) if message.role == "user"), 0)
            text = "" if found[first].content == observations.EMPTY else f"\n\n{found[first].content}"
            found[first] = Message(found[first].role, before + text)
        return tuple(found)

    # -- rewards ------------------------------------------------------------------------------------------------

    def total(self, before: float, reward: float | None) -> float:
        """The episode's reward after a step, in the server's unit."""
        return before if reward is None else before + reward if self._sum else reward

    def succeeded(self, total: float, observation: Mapping[str, Any]) -> bool:
        """Whether an episode that ended so has solved the task."""
        return bool(observation.get(self._success_field)) if self._success_field else total >= self._full

    def share(self, total: float, success: bool) -> float:
        """How much of the task is done, from 0 to 1."""
        return 1.0 if success else min(1.0, max(0.0, total / self._full))
