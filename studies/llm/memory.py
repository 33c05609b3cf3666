"""Peak memory of training: all weights compared with LoRA, measured and estimated."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import DTYPES, RECIPE, SKILLSD, WEIGHTS, as_typed, own_command, part, run

from skillsd.report.writer import read

SHORT = (
    *("training.iterations=1", "training.warmup_iterations=0", "training.minibatches=1"),
    *("training.micro_batch_tokens=2048", "rollout.tasks_per_iteration=2", "rollout.group_size=4"),
    *("curriculum.tasks=2", "evaluation.limit=1", "log.tensorboard=false", "method=grpo-opsd-synchronised"),
)
"""One iteration of 8 episodes. The teacher has the student's weights, as in Skill-SD, but the solver's plan as its
context: at its first visit a task has no skill yet, and no skill can be written from an untouched model's failures."""
MMAP = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Avoids the holes that large tensors leave in glibc's heap (docs/doctor.md)."""

TRAIN = """
import json, re, sys, time
from pathlib import Path
import torch
from skillsd.config import RunConfig, load
from skillsd.runs.lifecycle import run_training

def memory(name):  # not getrusage, whose peak starts at that of the parent process
    return 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
found = {"program_bytes": memory("VmRSS")}
def on_record(kind, record):
    if kind == "iteration":
        found["peak_bytes"] = memory("VmHWM")
begin = time.perf_counter()
run_training(load(RunConfig, sys.argv[1], sys.argv[3:]), Path(sys.argv[2]), on_record=on_record)
print(json.dumps({**found, "peak_with_checkpoint_bytes": memory("VmHWM"), "seconds": time.perf_counter() - begin}))
"""


def memory(folder: Path, model: str, base: Path) -> None:
    """All weights and LoRA; and the recipe's own first iteration, to compare with that of the run."""

    def measured(name: str, settings: Sequence[str], environment: dict[str, str]) -> None:
        part(folder, f"memory-{name}", lambda: _memory(folder / "training", settings, environment))

    for dtype in DTYPES:
        for weights, lora in WEIGHTS.items():
            chosen = [f"model.name={model}", f"model.dtype={dtype}", *lora, *SHORT]
            measured(f"{weights}-{dtype}", chosen, {})
            if dtype == "float32":
                measured(f"{weights}-{dtype}-mmap", chosen, MMAP)
    if (base / "warm_start.json").is_file():
        measured("recipe-mmap", [f"model.name={base}", "training.iterations=1", "log.tensorboard=false"], MMAP)


def _memory(folder: Path, settings: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """Peak of a process that trains, and the estimate of `skillsd doctor` for the same settings."""
    estimate = [*SKILLSD, "doctor", RECIPE, *settings]
    report = " ".join(run(estimate).split())
    most = re.search(r"peak ([\d,]+) MiB: ", report)
    if most is None:
        sys.exit("`skillsd doctor` printed no estimate of the memory")
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        out = run([sys.executable, "-c", TRAIN, RECIPE, str(folder), *settings], environment)
        (metrics,) = read(folder / "metrics.jsonl")
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a checkpoint of all weights has 2 GB
    kept = ("step/applied", "step/grad_norm", "batch/groups_with_teacher", "rollout/tokens", "episodes")
    return {
        "command": own_command(),
        "settings": list(settings),
        "environment": environment,
        "estimate_command": as_typed(estimate),
        "estimated_bytes": int(most[1].replace(",", "")) << 20,
        **json.loads(out.splitlines()[-1]),
        "metrics": {key: n for key, n in metrics.items() if key in kept or key.startswith("time/")},
    }
