"""The AppWorld task set, and an episode in it: code in, what it printed out."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from skillsd.envs.appworld import client, data, paths, prompt, summarise
from skillsd.envs.base import Environment, Step, TaskSet
from skillsd.errors import UserError, unknown_name
from skillsd.types import Demonstration, Message, Skill, Task, Trajectory

OFFICIAL = "official"


class AppWorldEnvironment(Environment):
    """One episode at a time, each in a world of its own."""

    def __init__(self, task_set: AppWorld) -> None:
        self._set = task_set
        self._world: client.World | None = None

    async def reset(self, task: Task, seed: int) -> tuple[Message, ...]:
        """Open the task's world. Nothing in it is random, so the seed makes no difference.

        Raises:
            WorldBrokenError: if it does not open; the collector tries again.
        """
        await self.close()
        options = self._set
        self._world = await client.World.open(options.host(), task.payload["task_id"], options.open_seconds)
        _warn_once(tuple(name for name in client.PROTECTIONS if name not in self._world.held))
        self._turns, self._score, self._done = 0, 0.0, False
        return options.prompt(task)

    async def step(self, action: str) -> Step:
        """Run the action's code.

        ``info`` has the code, the API calls, the error if there was one; once the databases were compared with what
        the task asks for, also how many tests pass of those that a no-op fails.
        """
        if self._world is None or self._done:
            raise RuntimeError("step() before reset(), or after the episode's end")
        self._turns += 1
        last = self._turns >= self._set.max_turns
        code = prompt.code_of(action, self._set.style)
        info: dict[str, Any] = {"code": None, "calls": [], "error": None, "completed": False, "output_chars": 0}
        if isinstance(code, prompt.Unusable):
            words, changed = code.reason, False
            info["error"] = "no code"
        else:
            answer = await self._world.execute(code.text, self._set.code_seconds)
            words = prompt.observation(answer["output"].rstrip("\n"), self._set.max_observation_chars)
            words = "\n".join(filter(None, (words, code.note)))
            changed = any(call["ok"] and call["changes"] for call in answer["calls"])
            info |= {"code": code.text, "output_chars": len(answer["output"])}
            info |= {key: answer[key] for key in ("calls", "error", "completed")}
        success = False
        if changed or info["completed"] or last:
            success = await self._evaluate(info)
        self._done = info["completed"] or (last and success)
        return Step(words, self._done, self._score, success and self._done, info)

    async def _evaluate(self, info: dict[str, Any]) -> bool:
        """Bring the score up to date: the share of the tests that a no-op fails (it would earn the others for nothing).

        A test that a no-op passes and this episode does not counts as one more that failed: damage costs.
        """
        assert self._world is not None
        verdict = await self._world.evaluate()
        passed = sum(label == "no_op_fail" for _, label in verdict["passes"])
        tests = passed + len(verdict["failures"])
        self._score = passed / tests if tests else float(verdict["success"])
        # What is tested stays hidden from the agent and from skills; it is for whoever reads the trajectories.
        info |= {key: [requirement for requirement, _ in verdict[key]] for key in ("passes", "failures")}
        info |= {"tests": tests, "passed": passed}
        return bool(verdict["success"])

    async def close(self) -> None:
        world, self._world = self._world, None
        if world is not None:
            await world.close()


class AppWorld(TaskSet):
    """Tasks in the apps of AppWorld, on its real engine: our own task world, or the official data.

    Args:
        root: folder that holds ``data``; ``official`` for what ``$APPWORLD_ROOT`` names. None is the task world that
            `skillsd envs setup appworld` builds; results on it are no results on the AppWorld benchmark.
        style: ``react`` or ``short``, see `skillsd.envs.appworld.prompt`.
        max_turns: code blocks in an episode; the paper's 40.
        max_observation_chars: an output is cut to so many characters, and says so.
        max_difficulty: only tasks up to this one.
        code_seconds: wall-clock seconds that a code block may run.
        open_seconds: wall-clock seconds that a world may take to open.

    Raises:
        UserError: for a bad value, or if the tasks are not there.
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
        self.data = data.World(_root(root))

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that can be played and graded here."""
        return tuple(split for split in self.data.splits if self._why_not(split) is None)

    @property
    def slowest_call(self) -> float:
        return max(self.open_seconds, self.code_seconds + client.SLACK_SECONDS + 10)  # 10: grading, which takes tenths

    @property
    def max_turns(self) -> int:
        return self._max_turns

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of a split, easy to hard.

        Raises:
            UserError: for an unknown split, one that can't be evaluated here, or one that `max_difficulty` empties.
        """
        self.data.tasks(split)
        if (why := self._why_not(split)) is not None:
            raise UserError(f"the split {split!r} of {str(self.data.root)!r} {why}: choose another")
        return self._of_difficulty(split)

    def _why_not(self, split: str) -> str | None:
        if not self._of_difficulty(split):
            return f"has no task of difficulty {self.max_difficulty} or less"
        blind = [task.id for task in self.data.tasks(split) if not self.data.has_ground_truth(task.id)]
        return f"can't be graded: {len(blind)} tasks have no ground truth ({blind[0]} ...)" if blind else None

    def _of_difficulty(self, split: str) -> list[Task]:
        most = self.max_difficulty
        return [task for task in self.data.tasks(split) if most is None or task.difficulty <= most]

    def host(self) -> client.Host:
        """The server of worlds.

        Raises:
            UserError: if AppWorld is not installed.
        """
        return client.host(paths.python(), self.data.root.absolute())

    def make(self) -> Environment:
        self.host()  # not installed: said now, and not once an episode
        return AppWorldEnvironment(self)

    def rules_in_words(self) -> Mapping[str, Any]:
        rules = {"engine": paths.VERSION, "style": self.style, "max_observation_chars": self.max_observation_chars}
        return rules | {"code_seconds": self.code_seconds, "world": self.data.fingerprint_source}

    def summariser(self) -> Callable[[Trajectory], Skill | None]:
        """Rules that name APIs, errors and a workflow; no language model."""
        return summarise.summariser(self.style)

    def oracle(self, task: Task) -> str | None:
        """The reference solution's code, turn by turn."""
        turns = self.data.solution(task.id)
        return None if turns is None else "\n".join(turn.code for turn in turns)

    def golden_skill(self, task: Task) -> Skill | None:
        """What the rules write of the reference solution, which is played for that; None if it solves nothing.

        Raises:
            UserError: if the infrastructure breaks again and again.
        """
        from skillsd.envs.appworld.demonstrations import solved

        actions = [prompt.turn_text(turn.thought, turn.code, self.style) for turn in self.data.solution(task.id) or ()]
        steps = asyncio.run(solved(self.play, task, actions)) if actions else []
        return summarise.summarise_turns([step.info for step in steps], True, self.style)

    def scenario(self, task: Task) -> str:
        """What the id says before its number."""
        return data.scenario_of(task.id)

    def secrets(self, task: Task) -> Sequence[str]:
        """The answer, where it is telling."""
        answer = str(self.data.answer(task.id) or "")
        return (answer,) if len(answer) > 3 else ()

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        """Reference solutions of the training tasks with the engine's own answers. See `demonstrations.Options`."""
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
        """What the agent is told first."""
        return prompt.first_prompt(task, self.style, data.APPS, self.max_turns)

    async def play(self, task: Task, actions: Sequence[str]) -> list[Step]:
        """The engine's answers to a script, in a fresh world."""
        environment = self.make()
        try:
            await environment.reset(task, 0)
            steps: list[Step] = []
            for action in actions:
                steps.append(await environment.step(action))
                if steps[-1].done:
                    break
            return steps
        finally:
            await environment.close()


def _root(given: str | None) -> Path:
    if given is None:
        return paths.world()
    if given != OFFICIAL:
        return Path(given).expanduser()
    root = paths.official()
    if root is None:
        raise UserError(
            "root is 'official', but $APPWORLD_ROOT names no folder with AppWorld's data: "
            f"`{paths.SETUP}` says how to get them. Our own tasks: environment.options.root=null"
        )
    return root


_warned: set[tuple[str, ...]] = set()


def _warn_once(missing: tuple[str, ...]) -> None:
    if missing and missing not in _warned:
        _warned.add(missing)
        warnings.warn(
            f"the model's code runs without these protections: {', '.join(missing)} (docs/appworld.md)", stacklevel=2
        )
