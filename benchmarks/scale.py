"""More than one process on two CPU cores, and what the training loop itself costs.

`sides`: the same three iterations of `sokoban-nano`, 64 episodes each, by one process, by two ranks, and by one and two
replicas. Each process has one thread. Replicas decode with the embedded engine in place of vLLM.

`loop`: CPU time per episode of whole iterations with an engine that has no model: environments, chat template, batches,
loss, bank and records. That is what rank 0 or the process beside vLLM or a server does by itself.

Sides and sizes alternate, in `--rounds` rounds, so that other work on the machine slows all alike. Shown are medians,
and the range of all counted iterations; the first one of each run is not counted.

    python benchmarks/scale.py [--only sides|loop] [--rounds 2] [--episodes 64 256 1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from scale_engines import Simulated

from skillsd.config import RunConfig, load
from skillsd.engines.base import Engine
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.torch.ranks import group
from skillsd.engines.vllm import client
from skillsd.report.writer import RunWriter
from skillsd.runs.build import build
from skillsd.training.loop import learn_phase, rollout_phase, train

BEGIN = time.perf_counter()
TASKS = 8
"""Groups of an iteration. With more episodes the groups are larger, so the bank stays the same."""

REPLICAS = ["engine.name=vllm", "objective.importance_cap=2"]
SIDES = {
    "one process": [],
    "two ranks": ["engine.shard=state"],
    "one replica": REPLICAS,
    "two replicas": [*REPLICAS, "engine.replicas=2"],
}
BASES = {"two ranks": "one process", "two replicas": "one replica"}
FIGURES = {"seconds": "wall-clock", "cpu": "CPU", "leader": "of it the leader", "mib": "memory"}
TRAFFIC = ("messages", "tensors", "weights")

Figures = dict[str, float]


# ---------------------------------------------------------------------------------------------------------- a side

FOLLOWER = """
import sys, torch, torch.distributed as dist
from skillsd.engines.torch.ranks import group
torch.set_num_threads(1)
group.follow(dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=False), 1, 2)
"""


class Snapshots:
    """Reads clocks and counters after each iteration: of this process, the leader, and of its children."""

    def __init__(self) -> None:
        self.messages = self.weights = 0
        self.iterations: list[Figures] = []
        self._before: Figures = {}

    def count(self, text: Any) -> Any:
        self.messages += len(text)
        return text

    def count_weights(self, learner: Any) -> None:
        """Count the bytes that `learner` publishes into folders."""
        publish = learner.publish

        async def counted(folder: Path | None = None) -> Any:
            handle = await publish(folder)
            self.weights += sum(file.stat().st_size for file in folder.iterdir()) if folder else 0
            return handle

        learner.publish = counted

    def iteration(self, record: dict[str, Any]) -> None:
        pids = _family()
        each = [_cpu(pid) for pid in pids]
        now: Figures = {"cpu": sum(each), "leader": each[0], "messages": self.messages, "tensors": _tcp_bytes()}
        now["weights"] = self.weights
        if self._before:
            found = {name: value - self._before[name] for name, value in now.items()}
            memory = {f"mib {number}": _peak_mib(pid) for number, pid in enumerate(pids)}
            found |= {"seconds": record["time/iteration"], "mib": sum(memory.values())}
            self.iterations.append({**found, **memory, "accuracy": record["rollout/accuracy"]})
        self._before = now

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def trajectories(self, iteration: int, groups: Any) -> None: ...

    def note(self, text: str) -> None: ...


def side(name: str) -> list[Figures]:
    """The figures of all iterations but the first. Counts this process's messages, so it needs one of its own."""
    torch.set_num_threads(1)
    overrides = [*SIDES[name], f"rollout.tasks_per_iteration={TASKS}", "rollout.group_size=8", "training.iterations=3"]
    overrides += ["evaluation.limit=1", "evaluation.every=0", "log.tensorboard=false"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        snapshots = Snapshots()
        if name == "two ranks":
            stack.enter_context(_second_rank(snapshots.count))
        if "replica" in name:
            overrides.append(f"engine.python={_standin(folder, snapshots.count)}")
        run = build(load(RunConfig, "sokoban-nano", overrides), folder)
        stack.callback(run.close)
        snapshots.count_weights(run.learner)
        asyncio.run(train(run, snapshots))
    return snapshots.iterations


@contextmanager
def _second_rank(count: Callable[[Any], Any]) -> Iterator[None]:
    send, receive = Connection.send_bytes, Connection.recv_bytes
    Connection.send_bytes = lambda self, data: send(self, count(data))
    Connection.recv_bytes = lambda self: count(receive(self))
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with subprocess.Popen([sys.executable, "-c", FOLLOWER, str(store.port)]), group.lead(store, 2):
        yield


def _standin(folder: Path, count: Callable[[Any], Any]) -> Path:
    """An interpreter whose ``vllm`` is the stand-in."""
    package, python = folder / "vllm", folder / "python"
    package.mkdir()
    (package / "__init__.py").write_text("from scale_engines import LLM, SamplingParams, __version__\n")
    (package / "platforms.py").write_text("class current_platform:\n    is_cpu = staticmethod(lambda: True)\n")
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    counted = {"dumps": lambda message: count(json.dumps(message)), "loads": lambda text: json.loads(count(text))}
    client.json = SimpleNamespace(**counted)
    return python


def _family() -> list[int]:
    """This process and its children."""
    found = [os.getpid()]
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if path.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.append(int(path.parent.name))
    return found


def _cpu(pid: int) -> float:
    """CPU seconds of all threads so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _tcp_bytes() -> int:
    """Bytes sent and received so far over the TCP sockets that this process has open: what gloo exchanges."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:  # not a socket, or not TCP
            total += sum(struct.unpack_from("QQ", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120))
    return total


# -------------------------------------------------------------------------------------------------------- the loop


def loop(episodes: int) -> Figures:
    """CPU seconds of this process per episode, by phase, in the second of two iterations."""
    overrides = [f"rollout.tasks_per_iteration={TASKS}", f"rollout.group_size={episodes // TASKS}"]
    overrides += [f"rollout.concurrency={episodes}", "log.tensorboard=false", "log.trajectories_every=1"]
    config = load(RunConfig, "sokoban-nano", [*overrides, "training.iterations=2"])
    simulated = Simulated()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = build(config, Path(folder), engine=Engine(simulated, simulated, "simulated", TorchOptions.capabilities))
        stack.callback(run.close)
        writer = RunWriter(Path(folder), config.log, name="loop", on_record=_ignore, on_note=_ignore)
        stack.callback(writer.close)

        async def iteration(number: int) -> Figures:
            begin = time.process_time()
            rollouts = await rollout_phase(run, number, writer)
            middle = time.process_time()
            writer.iteration(await learn_phase(run, rollouts, writer))
            end = time.process_time()
            return {"rollout": (middle - begin) / episodes, "learn": (end - middle) / episodes}

        async def both() -> Figures:
            await iteration(0)
            return await iteration(1)

        found = asyncio.run(both())
    return {**found, "iteration": sum(found.values())}


def growth(episodes: Sequence[int], each: Sequence[float]) -> float:
    """The exponent of time of an iteration ~ episodes ** exponent, from times per episode, by least squares."""
    x, y = [math.log(n) for n in episodes], [math.log(n * seconds) for n, seconds in zip(episodes, each, strict=True)]
    return statistics.linear_regression(x, y).slope


def _ignore(*_: Any) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ main


def sides_table(found: dict[str, list[Figures]]) -> Iterator[str]:
    yield f"| an iteration | {' | '.join(FIGURES.values())} | KiB of {', '.join(TRAFFIC)} |"
    yield "|---" * (len(FIGURES) + 2) + "|"
    middle = {
        name: {key: statistics.median(one[key] for one in rows) for key in rows[0]} for name, rows in found.items()
    }
    for name, rows in found.items():
        cells = [f"{middle[name][key]:.2f} s {_range(rows, key)}" for key in ("seconds", "cpu", "leader")]
        cells.append(
            " + ".join(f"{value:.0f}" for key, value in middle[name].items() if key.startswith("mib ")) + " MiB"
        )
        cells.append(", ".join(f"{middle[name][kind] / 1024:,.0f}" for kind in TRAFFIC))
        yield f"| {name} | {' | '.join(cells)} |"
    for name, base in BASES.items():
        ratios = [f"{middle[name][key] / middle[base][key]:.2f} x" for key in FIGURES]
        yield f"| **{name} / {base}** | {' | '.join(ratios)} | |"


def loop_table(found: dict[int, list[Figures]]) -> Iterator[str]:
    yield f"| CPU per episode | {' | '.join(f'{n:,} episodes' for n in found)} | growth |"
    yield "|---" * (len(found) + 2) + "|"
    for key in ("rollout", "learn", "iteration"):
        middle = [statistics.median(one[key] for one in rows) for rows in found.values()]
        cells = [f"{1e3 * m:.2f} ms {_range(rows, key, 1e3)}" for m, rows in zip(middle, found.values(), strict=True)]
        cells.append(f"n^{growth([*found], middle):.2f}")
        yield f"| {key} | {' | '.join(cells)} |"


def _range(rows: Sequence[Figures], key: str, unit: float = 1.0) -> str:
    return f"({unit * min(one[key] for one in rows):.2f} to {unit * max(one[key] for one in rows):.2f})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("sides", "loop"), help="one of the two parts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--episodes", type=int, nargs="+", default=[64, 256, 1024], help="of an iteration of `loop`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds is {given.rounds}, expected at least 1")
    if wrong := [n for n in given.episodes if n % TASKS or n < 2 * TASKS]:
        parser.error(f"--episodes has {wrong[0]}, expected multiples of {TASKS} from {2 * TASKS}")
    if len({*given.episodes}) < 2:
        parser.error("--episodes needs at least two different numbers, for the growth")
    return given


def _progress(text: str) -> None:
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def main() -> None:
    given = _parse()
    if given.side:
        print(json.dumps(side(given.side)))
        return
    about = {"command": sys.argv, "machine": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()}
    results: dict[str, Any] = {**about, "torch": torch.__version__}

    def keep() -> None:  # after each measurement, so that none is lost
        spent = {"seconds": time.perf_counter() - BEGIN, "cpu_seconds": sum(os.times()[:4])}
        results.update(spent, load_at_end=os.getloadavg())
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n")

    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    if given.only != "sides":
        torch.set_num_threads(1)
        costs: dict[int, list[Figures]] = {n: [] for n in given.episodes}
        results["loop"] = costs
        for number in range(given.rounds):
            for n, rows in costs.items():
                rows.append(loop(n))
                keep()
                _progress(f"round {number + 1} of {given.rounds}, {n:,} episodes: {1e3 * rows[-1]['iteration']:.2f} ms")
    if given.only != "loop":
        sides: dict[str, list[Figures]] = {name: [] for name in SIDES}
        results["sides"] = sides
        for number in range(given.rounds):
            for name in SIDES:
                command = [sys.executable, __file__, "--side", name]
                done = subprocess.run(command, env=one_thread, stdout=subprocess.PIPE, text=True, check=True)
                sides[name] += json.loads(done.stdout.splitlines()[-1])
                seconds, cpu = (sides[name][-1][key] for key in ("seconds", "cpu"))
                keep()
                _progress(f"round {number + 1} of {given.rounds}, {name}: {seconds:.2f} s, CPU {cpu:.2f} s")
    for part, table in (("loop", loop_table), ("sides", sides_table)):
        if part in results:
            print("\n".join(table(results[part])), end="\n\n")
    print(
        f"{results['seconds']:.0f} s, {results['cpu_seconds']:.0f} s of CPU; load {about['load'][0]:.1f} at the start"
    )


if __name__ == "__main__":
    main()
