"""A whole environment of your own: guess a number.

    cd examples
    python custom_env.py                    # check it against the interface
    skillsd sft guess-number-base.yaml      # a tiny base model, trained on the environment's demonstrations
    skillsd train guess-number.yaml         # Skill-SD on that model; method=grpo to compare

docs/environments.md explains each part.
"""

import random

from skillsd.envs import Environment, Step, TaskSet
from skillsd.envs.conformance import assert_conforms
from skillsd.errors import unknown_name
from skillsd.types import Demonstration, DemonstrationTurn, Message, Skill, Task

GUESSES, WIDTH, LOWEST = 4, 15, range(1, 18)  # 4 guesses are enough for 15 numbers: 7, 3, 1 and 0 can be left


class GuessGame(Environment):
    async def reset(self, task, seed):
        return self.begin(task)

    async def step(self, action):
        return self.play(action)

    def begin(self, task):
        self.secret, self.turns = task.payload["secret"], 0
        self.low, self.high = task.payload["low"], task.payload["low"] + WIDTH - 1
        return (Message("user", f"Guess my number. You have {GUESSES} guesses. {self.range()}"),)

    def range(self):
        return f"It is from {self.low:02} to {self.high:02}"

    def play(self, action):
        """A wrong guess narrows the range. Anything else changes nothing, except that it costs a guess."""
        self.turns += 1
        text, size = action.strip(), self.high - self.low + 1
        guess = int(text) if text.isdecimal() and len(text) < 4 and self.low <= int(text) <= self.high else None
        hint, won = "Not one of them.", guess == self.secret
        if guess is not None and guess < self.secret:
            hint, self.low = "Higher.", guess + 1
        elif guess is not None and guess > self.secret:
            hint, self.high = "Lower.", guess - 1
        ruled_out = size if won else size - (self.high - self.low + 1)
        info = {"guess": guess, "left": size, "ruled_out": ruled_out}  # for the summariser
        observation = "Right!" if won else f"{hint} {self.range()}"
        return Step(observation, won or self.turns >= GUESSES, float(won), won, info)


class GuessNumber(TaskSet):
    name, splits, max_turns = "guess-number", ("train", "tune", "test"), GUESSES

    def tasks(self, split):
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        every = [{"low": low, "secret": low + place} for low in LOWEST for place in range(WIDTH)]
        random.Random(0).shuffle(every)
        start, end = {"train": (0, 64), "tune": (64, 128), "test": (128, 255)}[split]
        return [Task(f"{one['secret']}-from-{one['low']}", self.name, split, one) for one in every[start:end]]

    def make(self):
        return GuessGame()

    def summariser(self):
        return lambda trajectory: lesson([turn.info for turn in trajectory.turns], trajectory.success)

    def golden_skill(self, task):
        return lesson([], False)

    def demonstrations(self, split, *, seed, expert_share=0.1, noise=0.2):
        """Half of them careless, without a skill; half follow a skill written about a careless episode."""
        rng = random.Random(seed)
        held_out = {task.id for other in ("tune", "test") for task in self.tasks(other)}
        while True:
            low, place = rng.choice(LOWEST), rng.randrange(WIDTH)
            task = Task(f"{low + place}-from-{low}", self.name, split, {"low": low, "secret": low + place})
            if task.id in held_out:
                continue
            infos, careless = demonstrate(task, rng, 1.0)
            yield careless if rng.random() >= expert_share else demonstrate(task, rng, 0.0)[1]
            yield demonstrate(task, rng, noise, lesson(infos, infos[-1]["ruled_out"] == infos[-1]["left"]))[1]


def lesson(infos, success):
    """The skill from an episode's `info`. It must not give away what the student can't work out: the number."""
    worst = min(infos, key=lambda info: info["ruled_out"] / info["left"], default=None)
    return Skill(
        success_analysis=f"found in {len(infos)} guesses" if success else "",
        mistake_analysis=f"one guess ruled out {worst['ruled_out']} of {worst['left']}" if worst else "",
        golden_workflow="always guess the middle of the numbers that are left",
    )


def demonstrate(task, rng, noise, skill=None):
    """An episode that guesses the middle, or with probability `noise` any number of the first range."""
    game, turns, infos, done = GuessGame(), [], [], False
    prompt, first = game.begin(task), (game.low, game.high)
    while not done:
        careless = rng.random() < noise
        guess = f"{rng.randint(*first) if careless else (game.low + game.high) // 2:02}"
        step = game.play(guess)
        turns.append(DemonstrationTurn(guess, step.observation, learn=skill is None or not careless))
        infos.append(step.info)
        done = step.done
    return infos, Demonstration(task, prompt, tuple(turns), skill)


if __name__ == "__main__":
    assert_conforms(GuessNumber(), actions=["8", "16", "24"])
    print("guess-number conforms")
