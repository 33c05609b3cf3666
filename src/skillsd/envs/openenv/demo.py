"""A small OpenEnv server: guess a number. It runs in the environment of `skillsd envs setup openenv-demo`.

It imports nothing of this package: it stands for anybody's server.

    python demo.py [--port 8000] [--sessions 8]
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

HIGHEST, TRIES = 32, 6
SIZES = {"train": 64, "test": 16}


class Guess(Action):
    guess: str


class Hint(Observation):
    hint: str = ""


class GuessNumber(Environment):
    """Guess a number in a few tries. A task is the range that it is in, with the number."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State()

    def list_splits(self) -> list[str]:
        return list(SIZES)

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        return [self.get_task(split, index) for index in range(self.num_tasks(split))]

    def num_tasks(self, split: str) -> int:
        return SIZES[split]

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        low = self._low(split, index)
        return {"id": f"{split}-{low}", "index": index}

    @staticmethod
    def _low(split: str, index: int) -> int:
        """Ranges that start at even numbers are for training, those that start at odd ones are held out."""
        return 2 * index + (split != "train")

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, split: str = "train", index: int = 0, **_: Any
    ) -> Hint:
        self._low_end = self._low(split, index)
        self._number = self._low_end + random.Random(seed).randrange(HIGHEST)
        self._state = State(episode_id=episode_id)
        high = self._low_end + HIGHEST - 1
        return Hint(hint=f"Guess a number from {self._low_end} to {high}, in {TRIES} tries. Answer with the number.")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Hint:
        self._state.step_count += 1
        last = self._state.step_count >= TRIES
        try:
            guess = int(action.guess)
        except ValueError:
            return Hint(hint="That is no number.", reward=0.0, done=last)
        if guess == self._number:
            return Hint(hint="Right.", reward=1.0, done=True)
        return Hint(hint="Higher." if guess < self._number else "Lower.", reward=0.0, done=last)

    @property
    def state(self) -> State:
        return self._state


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sessions", type=int, default=8)
    options = parser.parse_args()
    app = create_app(GuessNumber, Guess, Hint, env_name="guess", max_concurrent_envs=options.sessions)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
