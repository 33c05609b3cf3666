"""The AppWorld task set and its environment: the action is Python code, the observation is what it prints."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from skillsd.envs.appworld import client, data, paths, prompt, summarise
from skillsd.envs.base import Environment, Step, TaskSet, play_through
from skillsd.envs.hosts import HostBrokenError
from skillsd.errors import UserError, unknown_name
from skillsd.types import Demonstration, Message, Skill, Task, Trajectory

OFFICIAL = "official"


class AppWorldEnvironment(Environment):
    """Runs one episode at a time, each in a new world."""

    def __init__(self, task_set: AppWorld) -> None:
        self._set = task_set
        self._world: client.World | None = None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Open the task's world. The environment is deterministic: the seed is unused.

        Raises:
            HostBrokenError: if it does not open; the collector retries.
            UserError: if its jail lacks a protection that is required.
        """
        await self.close()
        options = self._set
        self._world = await client.World.open(options.host(), task.payload["task_id"], options.open_seconds)
        options.check_protections(self._world.protections)
        self._turns, self._reward, self._done = 0, 0.0, False
        return options.prompt(task)

    async def step(self, action: str) -> Step:
        """Run the action's code.

        ``info`` has the code, the API calls and the error, if any. After an evaluation it also has the tests that
        passed and failed, and how many of the tests that a no-op fails have passed.
        """
        if self._world is None or self._done:
            raise RuntimeError("step() before reset(), or after the episode's end")
        self._turns += 1
        last = self._turns >= self._set.max_turns
        code = prompt.code_of(action, self._set.style)
        info: dict[str, Any] = {"code": None, "calls": [], "error": None, "completed": False, "output_chars": 0}
        if isinstance(code, prompt.Unusable):
            text, changed = code.reason, False
            info["error"] = "no code"
        else:
            answer = await self._world.execute(code.text, self._set.code_seconds)
            text = prompt.observation(answer["output"].rstrip("\n"), self._set.max_observation_chars)
            text = "\n".join(filter(None, (text, code.note)))
            changed = any(call["ok"] and call["changes"] for call in answer["calls"])
            info |= {"code": code.text, "output_chars": len(answer["output"])}
            info |= {key: answer[key] for key in ("calls", "error", "completed")}
        success = False
        if changed or info["completed"] or last:
            success = await self._evaluate(info)
        self._done = info["completed"] or (last and success)
        return Step(text, self._done, self._reward, success and self._done, info)

    async def _evaluate(self, info: dict[str, Any]) -> bool:
        """Update the reward: the share of passed tests among those that a no-op fails.

        Tests that a no-op passes earn nothing, but one that fails here counts as an additional failed test, so side
        effects cost reward.
        """
        assert self._world is not None
        verdict = await self._world.evaluate()
        passed = sum(label == "no_op_fail" for _, label in verdict["passes"])
        tests = passed + len(verdict["failures"])
        self._reward = passed / tests if tests else float(verdict["success"])
        # For people who read trajectories. The agent and the skills never see the tests.
        info |= {key: [requirement for requirement, _ in verdict[key]] for key in ("passes", "failures")}
        info |= {"tests": tests, "passed": passed}
        return bool(verdict["success"])

    async def close(self) -> None:
        world, self._world = self._world, None
        if world is not None:
            await world.close()


class AppWorld(TaskSet):
    """Tasks in AppWorld's apps, on its original engine: our own task world, or the official data.

    Args:
        root: folder that contains ``data``; ``official`` for the folder in ``$APPWORLD_ROOT``; None for the task world
            that `skillsd envs setup appworld` builds. Results on that world are not results on the AppWorld benchmark.
        style: prompt style, ``react`` or ``short``; see `skillsd.envs.appworld.prompt`.
        max_turns: maximum code blocks in an episode; 40 in the paper.
        max_observation_chars: longer outputs are truncated, with a note.
        max_difficulty: use only tasks up to this difficulty.
        code_seconds: wall-clock limit of a code block.
        open_seconds: wall-clock limit for opening a world.
        unsafe_without: protections of the jail for the model's code that may be missing, from
            `skillsd.envs.appworld.client.PROTECTIONS`, or ``all``. By default all are required, and episodes are
            refused on machines that lack one.

    Raises:
        UserError: for an invalid value, or if the tasks are not available.
    """

    name: ClassVar[str] = data.NAME

    def __init__(
        self,
        root: str | None = None,
        style: str = "react",
        max_turns: int = 40,
        max_observation_chars: int = 3000,
        max_difficulty: int | None = None,
        code_seconds: float = 30.0,
        open_seconds: float = 60.0,
        unsafe_without: Sequence[str] | str = (),
    ) -> None:
        if style not in prompt.STYLES:
            raise unknown_name("AppWorld prompt style", str(style), prompt.STYLES)
        for option, value, least in (
            ("max_turns", max_turns, 1),
            ("max_observation_chars", max_observation_chars, 100),
            ("max_difficulty", 1 if max_difficulty is None else max_difficulty, 1),
            ("code_seconds", code_seconds, 1),
            ("open_seconds", open_seconds, 1),
        ):
            kinds: tuple[type, ...] = (int, float) if option.endswith("seconds") else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool) or value < least:
                raise UserError(f"AppWorld option {option} is {value!r}; expected a number, at least {least}")
        self.style: prompt.Style = style
        self._max_turns, self.max_observation_chars = max_turns, max_observation_chars
        self.code_seconds, self.open_seconds = float(code_seconds), float(open_seconds)
        self.max_difficulty = max_difficulty
        self._unsafe_without = _protection_names(unsafe_without)
        self.data = data.World(_root(root))

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that can be graded with these data."""
        return tuple(split for split in self.data.splits if self._why_not(split) is None)

    @property
    def slowest_call(self) -> float:
        return max(
            self.open_seconds, self.code_seconds + client.SLACK_SECONDS + 10
        )  # 10: grading, usually well below 1 s

    @property
    def max_turns(self) -> int:
        return self._max_turns

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, from easy to hard.

        Raises:
            UserError: for an unknown split, one that can't be graded, or one with no task up to `max_difficulty`.
        """
        self.data.tasks(split)
        if (why := self._why_not(split)) is not None:
            raise UserError(f"the split {split!r} of {str(self.data.root)!r} {why}: choose another")
        return self._of_difficulty(split)

    def _why_not(self, split: str) -> str | None:
        if not self._of_difficulty(split):
            return f"has no task of difficulty {self.max_difficulty} or less"
        ungraded = [task.id for task in self.data.tasks(split) if not self.data.has_ground_truth(task.id)]
        return f"can't be graded: {len(ungraded)} tasks have no ground truth ({ungraded[0]} ...)" if ungraded else None

    def _of_difficulty(self, split: str) -> list[Task]:
        most = self.max_difficulty
        return [task for task in self.data.tasks(split) if most is None or task.difficulty <= most]

    def host(self) -> client.Host:
        """The world server.

        Raises:
            UserError: if AppWorld is not installed.
        """
        return client.host(paths.python(), self.data.root.absolute())

    def check_machine(self) -> None:
        """See `TaskSet.check_machine`.

        Raises:
            UserError: if AppWorld is not installed, or the jail lacks a protection that is required.
        """
        key = (paths.python(), self.data.root.absolute())
        if key not in _protections:  # takes a second
            try:
                _protections[key] = client.protections(*key)
            except HostBrokenError as error:
                raise UserError(f"can't run the model's code: {error} (`skillsd doctor`)") from error
        self.check_protections(_protections[key])

    def check_protections(self, found: Sequence[str]) -> None:
        """Warn once about missing protections.

        Raises:
            UserError: if one of them is required.
        """
        missing = tuple(name for name in client.PROTECTIONS if name not in found)
        if required := [name for name in missing if name not in self._unsafe_without]:
            raise UserError(
                f"on this machine the jail for the model's code lacks {client.describe(required)}. docs/appworld.md "
                f"lists what provides it. To run nevertheless: environment.options.unsafe_without={listed(missing)}"
            )
        if missing and missing not in _warned:
            _warned.add(missing)
            text = f"the model's code runs without these protections: {client.describe(missing)} (docs/appworld.md)"
            warnings.warn(text, stacklevel=2)

    def make(self) -> Environment:
        self.check_machine()
        return AppWorldEnvironment(self)

    def rules_in_words(self) -> Mapping[str, Any]:
        rules = {"engine": paths.VERSION, "style": self.style, "max_observation_chars": self.max_observation_chars}
        rules |= {"code_seconds": self.code_seconds, "wording": prompt.wording(self.style, data.APPS)}
        return rules | {"world": self.data.fingerprint_source}

    def picture(self, trajectory: Trajectory, turn: int | None) -> Mapping[str, Any] | None:
        """A turn's code and its output; None before the first turn, and for a turn without code."""
        info = {} if turn is None else trajectory.turns[turn].info
        if turn is None or not info.get("code"):
            return None
        output = trajectory.turns[turn].observation
        return {"kind": "code", "input": info["code"], "output": output, "error": info.get("error")}

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """The rule-based summariser: API names, errors and a workflow."""
        return summarise.summariser(self.style)

    def oracle(self, task: Task) -> str | None:
        """The reference solution's code, turn by turn."""
        turns = self.data.solution(task.id)
        return None if turns is None else "\n".join(turn.code for turn in turns)

    def golden_skill(self, task: Task) -> Skill | None:
        """The summariser's skill for the reference solution, which is played in the engine; None if it fails.

        Raises:
            UserError: if the infrastructure fails in every attempt.
        """
        from skillsd.envs.appworld.demonstrations import solved

        actions = [prompt.turn_text(turn.thought, turn.code, self.style) for turn in self.data.solution(task.id) or ()]
        steps = asyncio.run(solved(self.play, task, actions)) if actions else []
        return summarise.summarise_turns([step.info for step in steps], True, self.style)

    def scenario(self, task: Task) -> str:
        """The task's id without its number."""
        return data.scenario_of(task.id)

    def secrets(self, task: Task) -> Sequence[str]:
        """The answer, if it is distinctive (more than 3 characters)."""
        answer = str(self.data.answer(task.id) or "")
        return (answer,) if len(answer) > 3 else ()

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """Reference solutions of the training tasks, with the engine's real outputs. See `demonstrations.Options`."""
        from skillsd.envs.appworld.demonstrations import demonstrate

        return demonstrate(
            self.data,
            self.play,
            self.prompt,
            split=split,
            seed=seed,
            style=self.style,
            rules={**self.rules_in_words(), "max_turns": self.max_turns},
            **options,
        )

    def prompt(self, task: Task) -> tuple[Message, ...]:
        """The episode's first prompt."""
        return prompt.first_prompt(task, self.style, data.APPS, self.max_turns)

    async def play(self, task: Task, actions: Sequence[str]) -> list[Step]:
        """Play a fixed list of actions in a new world, until they or the episode end."""
        return await play_through(self.make(), task, actions)


def _root(given: str | None) -> Path:
    if given is None:
        return paths.world()
    if given != OFFICIAL:
        return Path(given).expanduser()
    root = paths.official()
    if root is None:
        raise UserError(
            "root is 'official', but $APPWORLD_ROOT is not a folder with AppWorld's data: "
            f"`{paths.SETUP}` prints how to get them. For our own tasks: environment.options.root=null"
        )
    return root


def listed(names: Iterable[str]) -> str:
    """Names as a YAML list, as in a recipe or on the command line."""
    return f"[{','.join(names)}]"


def _protection_names(given: Sequence[str] | str) -> tuple[str, ...]:
    if given == "all":
        return tuple(client.PROTECTIONS)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(
            f"AppWorld option unsafe_without is {given!r}; expected 'all' or a list of protections, from "
            f"{listed(client.PROTECTIONS)}"
        )
    for name in given:
        if name not in client.PROTECTIONS:
            raise unknown_name("protection of AppWorld's jail", str(name), client.PROTECTIONS)
    return tuple(given)


_protections: dict[tuple[Path, Path], list[str]] = {}
"""What `client.protections` found, by its arguments."""

_warned: set[tuple[str, ...]] = set()
