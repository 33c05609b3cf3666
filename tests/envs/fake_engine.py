"""A text game for `textgames/host/serve.py`, without a Java: find the key in one of three rooms. Some commands are
faults of the engine."""

from __future__ import annotations

import os
import time
from typing import Any


class Engine:
    def game(self) -> Game:
        return Game()


class Game:
    def open(self, rooms: int, key: int) -> dict[str, Any]:
        self.rooms, self.key, self.room, self.won, self.lost = rooms, key, 0, False, False
        return {"task": f"Find the key. There are {rooms} rooms.", **self._state("You are in room 0.")}

    def step(self, command: str) -> dict[str, Any]:
        if command == "crash":
            os._exit(3)
        if command == "hang":
            time.sleep(1000)
        if command == "garbage":
            os.write(self._connection(), b"garbage\n")
        if command == "fault":
            raise ValueError("the engine has a fault")
        if command == "incomplete":
            return {"text": "nothing else"}
        words = command.split()
        if words[:1] == ["go"] and words[1:] and words[1] in map(str, range(self.rooms)):
            self.room = int(words[1])
            return self._state(f"You are in room {self.room}.")
        if command == "take key":
            self.won = self.room == self.key
            return self._state("You have the key." if self.won else "There is no key.")
        if command == "give up":
            self.lost = True
            return self._state("The game is over.")
        return self._state("Unknown action.")

    def pid(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def _connection(self) -> int:
        """The newest connection's file descriptor."""
        return max(int(name) for name in os.listdir("/proc/self/fd") if self._is_socket(int(name)))

    def _is_socket(self, number: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except OSError:
            return False

    def _state(self, text: str) -> dict[str, Any]:
        commands = ["take key", *(f"go {room}" for room in range(self.rooms) if room != self.room)]
        return {
            "text": text,
            "score": -1.0 if self.lost else float(self.won) or 0.5 * (self.room == self.key),
            "success": self.won,
            "done": self.won or self.lost,
            "place": f"{self.room} {self.won}",
            "commands": commands,
        }
