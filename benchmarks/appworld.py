"""Episodes per second and memory of AppWorld: our fork server compared with a pool of the package's own HTTP servers.

    .venv/bin/python benchmarks/appworld.py --json benchmarks/results/appworld.json

Both play the same reference solutions of the same training tasks, from opening the world to its evaluation, N at once.
The pool has N permanent uvicorn servers (as in the package, bound to loopback), which run the model's code in the same
process as the databases and the answers. The fork server starts a process per episode, and a jail for the code. In the
pool, an episode that hangs is lost; with the fork server it continues without its variables. Neither plays it again.
Rounds alternate between the two, so that noise hits both. Needs `skillsd envs setup appworld`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import memory_mib

from skillsd.envs.appworld import AppWorld, client, paths
from skillsd.report.manifest import commit, processor
from skillsd.types import Task

HANG = "while True:\n    try:\n        while True: pass\n    except Exception: pass"
HANG_SECONDS = 3.0


class Forked:
    """Our fork server."""

    def __init__(self, task_set: AppWorld, workers: int) -> None:
        self._set, self._workers = task_set, workers
        self._host = client.Host(paths.python(), task_set.data.root.absolute())
        begin = time.perf_counter()
        self._host.ensure()
        self.start_seconds = time.perf_counter() - begin

    def pids(self) -> list[int]:
        assert self._host._process is not None
        return [self._host._process.pid]

    async def episode(self, worker: int, task: Task, codes: list[str]) -> bool:
        world = await client.World.open(self._host, task.id, 60)
        for code in codes:
            await world.execute(code, HANG_SECONDS if code == HANG else 30)
        result = await world.evaluate(30)
        await world.close()
        return bool(result["success"])

    def stop(self) -> None:
        self._host.stop()


class Pooled:
    """The package's own server, one per worker; one that hangs has to be killed and restarted."""

    def __init__(self, task_set: AppWorld, workers: int) -> None:
        self._root = task_set.data.root.absolute()
        self._outputs = tempfile.mkdtemp(prefix="skillsd-bench-")
        begin = time.perf_counter()
        self._servers = [self._start() for _ in range(workers)]
        for _, port in self._servers:
            self._wait(port)
        self.start_seconds = time.perf_counter() - begin
        self._number = 0

    def _start(self) -> tuple[subprocess.Popen[bytes], int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(paths.python()), "-m", "uvicorn", "appworld.serve.environment:app", "--host", "127.0.0.1"]
        process = subprocess.Popen(
            [*command, "--port", str(port), "--log-level", "error"],
            env=os.environ | {"APPWORLD_ROOT": str(self._root)},
            cwd=self._root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return process, port

    def _wait(self, port: int) -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.05)

    def pids(self) -> list[int]:
        return [process.pid for process, _ in self._servers]

    async def episode(self, worker: int, task: Task, codes: list[str]) -> bool:
        self._number += 1
        return await asyncio.to_thread(self._episode, worker, task, codes, f"{self._outputs}/{self._number}")

    def _episode(self, worker: int, task: Task, codes: list[str], name: str) -> bool:
        port = self._servers[worker][1]
        self._call(port, "initialize", 120, task_id=task.id, experiment_name=name, timeout_seconds=100)
        for code in codes:
            try:
                self._call(port, "execute", HANG_SECONDS if code == HANG else 30, task_id=task.id, code=code)
            except TimeoutError:
                self._servers[worker][0].send_signal(signal.SIGKILL)
                self._servers[worker][0].wait()
                self._servers[worker] = self._start()
                self._wait(self._servers[worker][1])
                return False
        result = self._call(port, "evaluate", 30, task_id=task.id, suppress_errors=True)
        self._call(port, "close", 30, task_id=task.id)
        return bool(result["success"])

    def _call(self, port: int, name: str, seconds: float, **arguments: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        connection.request("POST", f"/{name}", json.dumps(arguments), {"Content-Type": "application/json"})
        response = json.loads(connection.getresponse().read())
        connection.close()
        return response["output"]

    def stop(self) -> None:
        for process, _ in self._servers:
            process.kill()
            process.wait()
        shutil.rmtree(self._outputs)


async def play(contestant: Forked | Pooled, workers: int, work: list[tuple[Task, list[str]]]) -> dict[str, float]:
    """Play all of `work`, `workers` episodes at once; returns seconds, peak memory and the number of solved tasks."""
    queue, solved, peak, done = list(reversed(work)), 0, 0.0, False

    async def one(worker: int) -> None:
        nonlocal solved
        while queue:
            task, codes = queue.pop()
            won = await contestant.episode(worker, task, codes)
            solved += won  # `solved += await ...` would lose what other workers add meanwhile

    async def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, await asyncio.to_thread(memory_mib, contestant.pids()))
            await asyncio.sleep(0.5)

    watcher = asyncio.create_task(watch())
    begin = time.perf_counter()
    await asyncio.gather(*(one(worker) for worker in range(workers)))
    seconds = time.perf_counter() - begin
    done = True
    await watcher
    return {"seconds": seconds, "peak_mib": peak, "solved": solved}


def measure(task_set: AppWorld, workers: int, episodes: int, rounds: int) -> dict[str, Any]:
    tasks = list(task_set.tasks("train"))
    solutions = {task.id: [turn.code for turn in task_set.data.solution(task.id) or ()] for task in tasks}
    work = [(task, solutions[task.id]) for task in (tasks * episodes)[:episodes]]
    hanging = [(task, [*codes[:1], HANG, *codes[1:]] if n % 10 == 0 else codes) for n, (task, codes) in enumerate(work)]
    found: dict[str, Any] = {}
    contestants = {"forked": Forked(task_set, workers), "pooled": Pooled(task_set, workers)}
    try:
        for name, contestant in contestants.items():
            first = asyncio.run(play(contestant, workers, work[:workers]))  # a process's first world is slow
            found[name] = {"start_seconds": contestant.start_seconds, "first_seconds": first["seconds"], "rounds": []}
        for _ in range(rounds):
            for name, contestant in contestants.items():
                found[name]["rounds"].append(round_ := asyncio.run(play(contestant, workers, work)))
                if round_["solved"] != episodes:
                    raise SystemExit(f"{name}: only {round_['solved']} of {episodes} reference solutions succeeded")
        for name, contestant in contestants.items():
            found[name]["hanging"] = asyncio.run(play(contestant, workers, hanging))
    finally:
        for contestant in contestants.values():
            contestant.stop()
    for row in found.values():
        seconds = [one["seconds"] for one in row["rounds"]]
        row["episodes_per_second"] = episodes / statistics.median(seconds)
        row["peak_mib"] = max(one["peak_mib"] for one in row["rounds"])
        row["seconds_lost_by_hanging"] = row["hanging"]["seconds"] - statistics.median(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task_set = AppWorld()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "episodes": options.episodes,
        "hang_seconds": HANG_SECONDS,
        "workers": {},
    }
    for workers in options.workers:
        report["workers"][workers] = found = measure(task_set, workers, options.episodes, options.rounds)
        for name, row in found.items():
            print(
                f"{workers} at once, {name}: {row['episodes_per_second']:.2f} episodes/s, {row['peak_mib']:.0f} MiB, "
                f"start {row['start_seconds']:.1f} + {row['first_seconds']:.1f} s, "
                f"{row['seconds_lost_by_hanging']:.1f} s lost when one in ten hangs"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
