"""A real model behind vLLM's server: it plays Sokoban, and writes skills about its episodes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillsd.config import SummariserSection
from skillsd.engines.endpoint import Endpoint
from skillsd.envs.sokoban import Sokoban
from skillsd.rollouts.collect import collect
from skillsd.rollouts.endpoint_policy import EndpointPolicy
from skillsd.rollouts.policy import Budget
from skillsd.skills.background import BackgroundSummaries
from skillsd.skills.bank import Bank
from skillsd.skills.endpoint_summariser import NAMES, EndpointSummariser
from skillsd.skills.summary_prompt import SummaryPrompt, load_prompt

PYTHON = Path(__file__).parents[1] / "build" / "vllm" / "bin" / "python"
"""Made by `make vllm-env`."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM in {PYTHON.parents[1]}: make vllm-env"),
]
START_SECONDS = 300


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "4096"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as log_file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        process = subprocess.Popen(command, stdout=log_file, stderr=log_file, env=environment)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"no server:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_it_plays_and_writes_skills(server: str, tmp_path: Path) -> None:
    options = SummariserSection(
        model="smollm2",
        base_url=server,
        max_output_tokens=400,
        temperature=0.7,
        request={"seed": 1},
        timeout_seconds=200,
        max_retries=0,
    )
    task_set, counts = Sokoban(preset="nano"), Counter[str]()
    tasks = task_set.tasks("train")[:2]
    budget = Budget(turns=3, turn_tokens=12, trajectory_tokens=2000)

    async def run() -> list[int]:
        policy = EndpointPolicy(Endpoint(options, counts, NAMES))
        collected = await collect(policy, task_set, tasks, budget, group_size=2, seed=0)
        assert not collected.dropped
        played = [trajectory for group in collected.groups for trajectory in group.trajectories]
        assert len(played) == 4
        assert all(trajectory.turns for trajectory in played)
        assert all(turn.action for trajectory in played for turn in trajectory.turns)
        assert counts["tokens_in"] > 0
        assert not counts["calls_without_usage"]

        prompt = SummaryPrompt(load_prompt("summarise"), max_chars=4000, max_input_chars=8000)
        summaries = BackgroundSummaries(
            EndpointSummariser(options, prompt, counts), bank, max_chars=4000, concurrency=4, timeout=600, counts=counts
        )
        for number, trajectory in enumerate(played):
            summaries.submit(trajectory, source=str(number), iteration=1)
        await summaries.drain()
        return [summaries.collect()]

    bank = Bank(tmp_path / "skills.sqlite")
    begin = time.monotonic()
    written = asyncio.run(run())[0]
    print(f"{time.monotonic() - begin:.1f} s; {written} skills; {dict(counts)}")
    # The server enforces the schema, but so small a model often writes skills that are rejected, and counted.
    assert written + sum(count for reason, count in counts.items() if reason.startswith("rejected")) == len(tasks) * 2
    assert not [reason for reason in counts if reason.startswith("failed")]
    skills = [skill for task in tasks for skill in bank.skills(task.id)]
    assert len(skills) == written
    for skill in skills:
        print(skill)
    bank.close()
