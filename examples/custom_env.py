"""A whole environment in a few lines: guess a number. Run it: `python examples/custom_env.py`."""

from skillsd.envs import Environment, Step, TaskSet
from skillsd.envs.conformance import assert_conforms
from skillsd.errors import unknown_name
from skillsd.types import Message, Task


class GuessGame(Environment):
    async def reset(self, task, seed):
        self.secret, self.turns = task.payload["secret"], 0
        return (Message("user", "Guess a number from 0 to 99. You have 10 guesses."),)

    async def step(self, action):
        self.turns += 1
        text = action.strip()
        guess = int(text) if text.isdecimal() and len(text) < 4 else None
        won = guess == self.secret
        hint = "Not a number." if guess is None else "Lower." if guess > self.secret else "Higher."
        return Step("Right!" if won else hint, won or self.turns >= 10, float(won), won, {"guess": guess})


class GuessNumber(TaskSet):
    name, splits, max_turns = "guess-number", ("train", "test"), 10

    def tasks(self, split):
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        secrets = range(100)[self.splits.index(split) :: 2]  # even numbers to train on, odd ones to test
        return [Task(f"guess-{n}", self.name, split, {"secret": n}) for n in secrets]

    def make(self):
        return GuessGame()


if __name__ == "__main__":
    assert_conforms(GuessNumber(), actions=["50", "0", "7"])
    print("guess-number conforms. In a recipe: environment: {name: custom_env:GuessNumber}")
