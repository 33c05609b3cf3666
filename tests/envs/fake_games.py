"""A task set on `fake_engine`, for tests of hosts and text games."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from skillsd.envs import hosts
from skillsd.envs.own_venv import OwnVenv
from skillsd.envs.textgames.engine import SERVE, Engine
from skillsd.envs.textgames.environment import TextGames
from skillsd.errors import unknown_name
from skillsd.types import Task


class FakeEngine(Engine):
    def host(self) -> hosts.Host:
        def command(socket: Path) -> list[str]:
            return [sys.executable, str(SERVE), self.module, str(socket)]

        return hosts.Host("the fake host", command, env={"PYTHONPATH": str(Path(__file__).parent)})


class FakeGames(TextGames):
    name: ClassVar[str] = "fake-games"
    engine: ClassVar[Engine] = FakeEngine(OwnVenv("Fake", "fake", "none", ()), "fake_engine")
    commands: ClassVar[str] = "Commands: go N, take key."

    def __init__(self, style: str = "react", hosts: int = 1, call_seconds: float = 20.0, max_turns: int = 6) -> None:
        super().__init__(style, max_turns, 200, hosts, call_seconds)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        rooms = self.splits.index(split) + 3
        return [Task(f"{rooms}-{key}", self.name, split, {"rooms": rooms, "key": key}) for key in range(rooms)]

    def opening(self, task: Task) -> Mapping[str, Any]:
        return task.payload

    def gold(self, task: Task) -> Sequence[str]:
        key = task.payload["key"]
        return (f"go {key}", "take key") if key else ("take key",)

    def refused(self, command: str, text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        return before["place"] == after["place"]

    def check_machine(self) -> None:
        pass
