"""`skillsd envs setup textworld-express`: installs the engine and a Java, and lists the default options' games."""

from __future__ import annotations

from skillsd.envs.setups import Say, Setup
from skillsd.envs.textworld_express.environment import TextWorldExpress
from skillsd.envs.textworld_express.venv import VENV


def setup(say: Say, *, python: str | None = None) -> None:
    """Run the steps that are not done yet.

    Args:
        say: receives one line of output at a time.
        python: the Python for the virtual environment; default: the running one.

    Raises:
        UserError: if the Python is not supported, or a step fails.
    """
    VENV.setup(say, python=python)
    say("listing the games (half a minute) ...")
    games = TextWorldExpress()
    say(", ".join(f"{split} {len(games.tasks(split))}" for split in games.splits))
    games.pool().stop()


SETUP = Setup("TextWorld-Express's engine and a Java (a minute, 160 MB)", VENV.installed, setup)
