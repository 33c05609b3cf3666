"""The measurements by name, how one is written, and the commands they run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillsd.files.write import write_whole
from skillsd.report import manifest

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""
SKILLSD = [sys.executable, "-m", "skillsd"]
RECIPE = "sokoban-smollm2"
PLAIN = "smollm2-135m"

EVALUATIONS = ("untouched", "warm-start", "trained")
DTYPES = ("float32", "bfloat16")
ENGINES = ("torch", "vllm")
WEIGHTS = {"full": [], "lora": ["model.lora={rank: 16, alpha: 32}"]}
"""What is trained -> the settings."""

PARTS = (
    *(f"evaluation-{name}" for name in EVALUATIONS),
    *(f"gap-{engine}-{dtype}" for engine in ENGINES for dtype in DTYPES),
    "server",
    *(f"memory-{weights}-{dtype}" for weights in WEIGHTS for dtype in DTYPES),
    *(f"memory-{weights}-float32-mmap" for weights in WEIGHTS),
    "memory-recipe-mmap",
)


def part(folder: Path, name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Measure and write `NAME.json`, with how it was measured, unless the file exists."""
    path = folder / f"{name}.json"
    if path.is_file():
        print(f"{name}: measured before", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name} ...", flush=True)
    begin, load, commit = time.perf_counter(), os.getloadavg(), manifest.commit()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    figures = measure()
    figures["measured"] = {
        "started": started,
        "seconds": time.perf_counter() - begin,
        "commit": commit,
        "load": [load[0], os.getloadavg()[0]],
        "niceness": os.nice(0),
        "threads": 1,
        "versions": manifest.versions(),
    }
    write_whole(path, json.dumps(figures, indent=1))
    print(f"{name}: {figures['measured']['seconds']:.0f} s", flush=True)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command, show its standard output and return it; exit if it fails."""
    print("+", *(f"{name}={value}" for name, value in (environment or {}).items()), as_typed(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{as_typed(command)}: exit code {done.returncode}")
    return done.stdout


def as_typed(command: Sequence[str]) -> str:
    """The command as a user would type it."""
    words = ["skillsd", *command[3:]] if list(command[:3]) == SKILLSD else list(command)
    return shlex.join(word.replace(f"{ROOT}/", "") for word in words)


def own_command() -> str:
    """The command line of this process."""
    return as_typed(["python", *sys.argv])
