"""Whole runs in two ranks, by torchrun and by `--gpus`: killed, stopped or failing ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_run import toy_settings, without_clocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TESTS = Path(__file__).parents[2]
KILLS = 10

OWN_TERM = """
import torch.distributed as dist

calls = 0


def failing(student, signals):
    global calls
    calls += 1
    if calls > 2 and dist.get_rank() == 1:
        raise ValueError("a fault in the loss")
    return -student.chosen * 0
"""


OWN_MEMORY = """
import torch.distributed as dist

calls = 0


def failing(student, signals):
    global calls
    calls += 1
    if calls == 5 and dist.get_rank() == 1:
        raise MemoryError("no room")
    return -student.chosen * 0
"""


class Started:
    """`skillsd train` in two ranks; `output` is complete once it has ended."""

    def __init__(self, recipe: Path, out: Path, *options: object, torchrun: bool = False) -> None:
        by_torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "skillsd"]
        arguments = ["train", recipe, "--out", out, *options, *(() if torchrun else ("--gpus", 2))]
        self.out = out
        self._log = open(out.with_suffix(".log"), "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", *(by_torchrun if torchrun else ["skillsd"]), *map(str, arguments)],
            cwd=recipe.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)]), "OMP_NUM_THREADS": "1"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        """The ranks' process ids, rank 0 first if it trains already."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        commands = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in found.stdout.split()}
        pids = [pid for pid, path in commands.items() if path.exists() and "spawn_main" in path.read_text()]
        lock = self.out / ".lock"
        holder = lock.read_text(encoding="utf-8") if lock.exists() else ""
        return sorted(pids, key=lambda pid: str(pid) not in holder)

    def iterations(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def until(self, condition: Callable[[], Any], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def ended(self, seconds: float = 900) -> int:
        return self.process.wait(seconds)

    @property
    def output(self) -> str:
        return self.out.with_suffix(".log").read_text(encoding="utf-8")

    def stop(self) -> None:
        for pid in self.ranks():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._log.close()


Start = Callable[..., Started]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """`start(folder, *options, torchrun=False, **sections)` trains the toy run in two ranks."""
    started: list[Started] = []

    def make(folder: str, *options: object, torchrun: bool = False, **sections: Any) -> Started:
        engine = {"shard": "state", "rank_seconds": 60, **sections.pop("engine", {})}
        settings = toy_settings(tiny_model, engine=engine, checkpoint={"every": 1}, **sections)
        recipe = tmp_path / f"{folder}.yaml"
        recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        started.append(Started(recipe, tmp_path / folder, *options, torchrun=torchrun))
        return started[-1]

    yield make
    for run in started:
        run.stop()


def final(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The last checkpoint's weights, and the metrics without clocks."""
    last = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    state = torch.load(last / "engine.pt", weights_only=True)
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return state["weights"], without_clocks(list(records))


@pytest.mark.parametrize("shard", ["state", "layers"])
def test_ranks_killed_at_random_times(shard: str, start: Start, tmp_path: Path) -> None:
    """Whichever rank is killed, and whenever: the weights and metrics are those of a run that nothing happened to."""
    sections: dict[str, Any] = {"engine": {"shard": shard}, "training": {"iterations": 40}}
    kills = KILLS if shard == "state" else 2
    undisturbed = start("undisturbed", torchrun=True, **sections)
    assert undisturbed.ended() == 0, undisturbed.output
    killed = start("killed", "--max-restarts", kills + 2, **sections)
    rng = random.Random(0)
    for number in range(kills):
        before = killed.iterations()
        killed.until(lambda: len(killed.ranks()) == 2)
        if number % 5:  # every fifth one while the ranks start
            killed.until(lambda before=before: killed.iterations() > before)
        time.sleep(rng.uniform(0, 1.5))
        pids = killed.ranks()
        os.kill(pids[rng.randrange(len(pids))], signal.SIGKILL)
        killed.until(lambda pids=pids: not set(killed.ranks()) & set(pids))
    assert killed.ended() == 0, killed.output
    assert f"started again ({kills})" in killed.output
    (weights, metrics), (expected, records) = final(tmp_path / "killed"), final(tmp_path / "undisturbed")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert metrics == records


def test_a_rank_that_hangs_ends_the_run_in_time(start: Start) -> None:
    run = start("hangs", "--max-restarts", 0, engine={"rank_seconds": 25}, training={"iterations": 1000})
    run.until(lambda: run.iterations() >= 2)
    follower = run.ranks()[1]
    os.kill(follower, signal.SIGSTOP)
    begin = time.monotonic()
    run.until(lambda: "engine.rank_seconds" in run.output, 60)
    assert time.monotonic() - begin < 25 + 5 + 10  # the deadline, the wait for reasons, and a busy machine
    assert "rank 1 gave no answer within 25 s" in " ".join(run.output.split())
    assert run.ended(90) == 2  # torchrun waits 30 s for a rank that doesn't end


def test_a_rank_that_raises_ends_the_run_with_its_reason(start: Start, tmp_path: Path) -> None:
    (tmp_path / "own_term.py").write_text(OWN_TERM, encoding="utf-8")
    terms = [{"name": "own", "fn": "own_term:failing", "weight": 0.1}]
    run = start("raises", objective={"lambda_sdl": 0.1, "terms": terms})
    assert run.ended() == 2
    output = " ".join(run.output.split())
    assert "error: rank 1 failed: " in output
    assert "a fault in the loss" in output
    assert "started again" not in output  # it would come again


@pytest.mark.parametrize("shard", ["state", "layers"])
def test_a_rank_out_of_memory(shard: str, start: Start, tmp_path: Path) -> None:
    """With `layers`, ranks wait for each other in a pass, so one that fails can't repeat it: the run ends at once."""
    (tmp_path / "own_memory.py").write_text(OWN_MEMORY, encoding="utf-8")
    terms = [{"name": "own", "fn": "own_memory:failing", "weight": 0.1}]
    run = start(shard, engine={"shard": shard, "rank_seconds": 600}, objective={"lambda_sdl": 0.1, "terms": terms})
    begin = time.monotonic()
    code, output = run.ended(), " ".join(run.output.split())
    if shard == "state":
        assert code == 0, output
        assert "out of memory in a forward pass" in output
        return
    assert code == 2
    assert "error: rank 1 failed: out of memory while computing gradients" in output
    assert "started again" not in output
    assert time.monotonic() - begin < 600, "not only after engine.rank_seconds"


def test_ctrl_c_stops_after_the_iteration(start: Start) -> None:
    run = start("stopped", training={"iterations": 1000})
    run.until(lambda: run.iterations() >= 1)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.ended() == 130
    assert "stopped and saved. To resume: skillsd train" in " ".join(run.output.split())
    assert run.output.count("stopping after this iteration") == 1
    assert (run.out / "checkpoints" / f"step-{run.iterations()}").is_dir()
