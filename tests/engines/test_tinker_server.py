"""SkyRL's own server, on its JAX back end on the CPU. Skipped without build/skyrl (`make skyrl-env`)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from skillsd.engines.torch.models import SHIPPED

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build" / "skyrl" / "bin" / "python"
"""Where `make skyrl-env` puts it."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not PYTHON.exists(), reason="no SkyRL server in build/skyrl: make skyrl-env"),
]
MODEL = str(SHIPPED["nano"])
BACKEND = {
    **{"sample_max_num_sequences": 16, "train_micro_batch_size": 16},
    **{"max_lora_adapters": 10, "max_lora_rank": 8},
}


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    path = f"{PYTHON.parent}{os.pathsep}{kept['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "UV_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TINKER_TELEMETRY": "0"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(PYTHON.parents[1] / "jax-cache")}
    return {**kept, **offline, **cache, "VIRTUAL_ENV": str(PYTHON.parents[1]), "PATH": path, **more}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server's."""
    folder = tmp_path_factory.mktemp("skyrl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(PYTHON.with_name("uv"), "run", "--active", "--no-project", "-m", "skyrl.tinker.api"),
        *("--base-model", MODEL, "--backend", "jax", "--host", "127.0.0.1", "--port", str(port)),
        *("--database-url", f"sqlite:///{folder}/t.db", "--checkpoints-base", str(folder / "states")),
        *("--backend-config", json.dumps(BACKEND)),
    ]
    log = folder / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    found = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if server.poll() is not None or _answers(found):
                break
            time.sleep(1)
        if not _answers(found):
            pytest.fail(f"SkyRL's server does not answer:\n{log.read_text()[-3000:]}")
        yield found
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/v1/healthz", timeout=5):
            return True
    except OSError:
        return False


def run(*command: str) -> str:
    done = subprocess.run(
        [str(PYTHON), *command],
        env=environment(PYTHONPATH=str(ROOT / "src"), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=2300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gradients_equal_the_embedded_engines(address: str, tmp_path: Path) -> None:
    """One datum on policy, the general route off policy, an exported adapter, and a restored state."""
    found = json.loads(run(str(Path(__file__).with_name("skyrl_parity.py")), address, MODEL, str(tmp_path)))
    print(found)
    for server, local in found["norms"]:
        assert server == pytest.approx(local, rel=1e-5)
    assert found["sampled minus scored"] < 1e-4
    assert found["scored minus local"] < 1e-4
    assert found["after three steps"] < 1e-4
    assert found["resumed"] == 0.0


def test_sokoban_is_trained_and_resumed(address: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [
        *("engine.name=tinker", "engine.server=skyrl-jax", f"engine.base_url={address}", "model.lora={rank: 8}"),
        *("training.max_grad_norm=.inf", "rollout.tasks_per_iteration=4", "rollout.group_size=6"),
        *(
            "curriculum.tasks=8",
            "curriculum.easy_first=true",
            "evaluation.limit=2",
            "evaluation.every=0",
            "checkpoint.every=1",
        ),
    ]
    settings += ["training.learning_rate=0.001", "log.tensorboard=false"]
    run("-m", "skillsd", "train", "sokoban-nano", *settings, "training.iterations=1", "--out", str(out))
    run("-m", "skillsd", "train", "sokoban-nano", *settings, "training.iterations=2", "--out", str(out), "--resume")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2]
    assert max(record["step/grad_norm"] for record in records) > 0
    for record in records:
        assert record["step/applied"] == 2
        assert record["rollout/policy_lag"] == 0
        assert record["sampler_trainer_logprob_diff/max"] < 1e-4
