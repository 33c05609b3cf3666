"""`skillsd envs setup openenv-demo`: the package `openenv` in an environment of its own, to try the client with it."""

from __future__ import annotations

from pathlib import Path

from skillsd.envs.own_venv import OwnVenv
from skillsd.envs.setups import Say, Setup

VERSION = "0.10.0"
"""The version that the client and the server are tested with."""

SERVER = Path(__file__).parent / "demo.py"

VENV = OwnVenv(
    title=f"OpenEnv {VERSION}",
    folder=f"openenv-{VERSION}",
    command="skillsd envs setup openenv-demo",
    requirements=(f"openenv=={VERSION}",),
    megabytes=900,
    hint="two minutes, 480 MB",
)


def setup(say: Say, *, python: str | None = None) -> None:
    """Install the package and say how to start the demo's server; raises UserError if that fails."""
    VENV.setup(say, python=python)
    say(f"start the demo's server: {VENV.interpreter} {SERVER}")
    say("play on it:              skillsd envs play openenv url=http://127.0.0.1:8000")


SETUP = Setup("the openenv package with a small server, to try the client (two minutes, 480 MB)", VENV.installed, setup)
