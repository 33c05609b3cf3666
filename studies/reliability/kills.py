"""SIGKILL at random moments, then --resume: is the result that of a run nobody touched? See docs/reliability.md.

    python studies/reliability/kills.py --kills 200 --work /tmp/kills

Each life is `skillsd train` in a forked child of this process, which has imported everything but computed nothing, so
that a life costs a second instead of ten. The child says on a pipe when it enters a phase; the parent waits a random
part of that phase and kills it. After each kill the run's checkpoints are counted; at its end the weights, the
optimiser, the metrics and the bank are compared with those of the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from skillsd.cli import app as cli
from skillsd.report import writer as report
from skillsd.skills.bank import Bank
from skillsd.training import checkpoint, loop

SETTINGS = [
    "sokoban-nano",
    "rollout.tasks_per_iteration=4",
    "rollout.group_size=4",
    "curriculum.tasks=8",  # tasks come again, so that skills are picked and credited
    "training.iterations=8",
    "evaluation.every=2",
    "evaluation.limit=8",
    "checkpoint.every=2",
    "log.tensorboard=false",
    "log.trajectories_every=1",
]
CLOCKS = ("time/", "memory/", "seconds", "rollout/sampled_tokens_per_second", "eval/seconds", "eval_greedy/seconds")
"""Beginnings of the metrics that depend on the clock or the memory."""

PHASES: dict[str, tuple[Any, str]] = {
    "checkpoint": (checkpoint, "save"),
    "bank commit": (Bank, "batch"),
    "bank snapshot": (Bank, "snapshot"),
    "evaluation": (loop, "measure"),
    "metrics": (report.RunWriter, "iteration"),
    "update": (loop, "update"),
    "rollout": (loop, "collect"),
}
"""Phase -> the owner and the name of the function that is that phase."""


def announce(channel: int) -> None:
    """Have each phase's function write the phase's number and + or - to the pipe when it begins and ends."""
    for number, (owner, name) in enumerate(PHASES.values()):
        setattr(owner, name, _announced(getattr(owner, name), number, channel))


def _announced(function: Callable[..., Any], number: int, channel: int) -> Callable[..., Any]:
    def say(sign: bytes) -> None:
        os.write(channel, bytes([number]) + sign)

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped(*args: Any, **options: Any) -> Any:
            say(b"+")
            result = await function(*args, **options)
            say(b"-")
            return result

        return wrapped

    @functools.wraps(function)
    def plain(*args: Any, **options: Any) -> Any:
        say(b"+")
        result = function(*args, **options)
        if hasattr(result, "__enter__"):  # a context manager: the phase is its block
            return _Block(result, say)
        say(b"-")
        return result

    return plain


class _Block:
    def __init__(self, inner: Any, say: Callable[[bytes], None]) -> None:
        self._inner, self._say = inner, say

    def __enter__(self) -> Any:
        return self._inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        ended = self._inner.__exit__(*error)
        self._say(b"-")
        return ended


class Life:
    """One `skillsd train` in a child process."""

    def __init__(self, folder: Path, seed: int, *, resume: bool) -> None:
        self._pipe, channel = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            announce(channel)
            sys.argv = ["skillsd", "train", *SETTINGS, f"seed={seed}", "--out", str(folder)]
            if resume:
                sys.argv.append("--resume")
            code = 1
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(channel)

    def events(self, timeout: float) -> Iterator[tuple[str, bool, float]]:
        """(phase, whether it begins, time), until the child ends.

        Raises:
            TimeoutError: if it says nothing for `timeout` seconds.
        """
        names = list(PHASES)
        while True:
            if not select.select([self._pipe], [], [], timeout)[0]:
                raise TimeoutError(f"the run said nothing for {timeout:g} s")
            said = os.read(self._pipe, 2)
            if not said:
                return
            yield names[said[0]], said[1:] == b"+", time.monotonic()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code; -9 if it was killed."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(status)


def uninterrupted(folder: Path, seed: int) -> tuple[float, dict[str, list[float]]]:
    """Run to the end; the seconds it took, and the seconds of each passage through each phase."""
    life, begun, lengths = Life(folder, seed, resume=False), {}, {name: [] for name in PHASES}
    start = time.monotonic()
    for phase, begins, at in life.events(600):
        if begins:
            begun[phase] = at
        else:
            lengths[phase].append(at - begun[phase])
    if life.wait():
        raise SystemExit(f"the uninterrupted run failed: {folder.with_suffix('.log')}")
    return time.monotonic() - start, lengths


def kill_once(folder: Path, seed: int, rng: random.Random, whole: float, lengths: dict[str, list[float]]) -> str | None:
    """Start or go on, and kill at a random moment; the moment's name, or None if the run was done before."""
    life = Life(folder, seed, resume=(folder / "config.yaml").exists() or folder.exists())
    where = rng.choice(["any", *(name for name in PHASES if lengths[name])])
    if where == "any":
        time.sleep(rng.uniform(0, whole))
        life.kill()
        return where if life.wait() == -signal.SIGKILL else None
    passage = rng.randrange(len(lengths[where]))
    for phase, begins, _ in life.events(600):
        if phase == where and begins:
            if passage == 0:
                time.sleep(rng.uniform(0, rng.choice(lengths[where])))
                life.kill()
                break
            passage -= 1
    code = life.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"exit code {code} after a kill: {folder.with_suffix('.log')}")
    return where if code else None


def result(folder: Path) -> dict[str, Any]:
    """What a run leaves behind, without clocks and counts of restarts."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    state = torch.load(newest / "engine.pt", weights_only=True)
    with closing(sqlite3.connect(folder / "skills.sqlite")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        bank = {name: sorted(map(repr, db.execute(f'SELECT * FROM "{name}"'))) for name in tables}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in record.items() if not key.startswith(CLOCKS)} for record in metrics]
    rest = json.loads((newest / "state.json").read_text())
    del rest["totals"]["seconds"]
    return {"engine": state, "bank": bank, "metrics": metrics, "state": rest}


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two results differ first; None if they are equal to the bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return None if same else path
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(filter(None, (difference(one[key], other[key], f"{path}/{key}") for key in one)), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{path}/{i}") for i, (a, b) in pairs)), None)
    return None if one == other or (one != one and other != other) else path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=5, help="kills of one run, before it is let go to its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    rng, kills, lost, unequal, runs, start = random.Random(args.seed), Counter(), 0, [], 0, time.monotonic()
    while kills.total() < args.kills:
        seed = runs % 4
        reference = args.work / f"whole-{seed}"
        if not (args.work / f"whole-{seed}.json").exists():
            shutil.rmtree(reference, ignore_errors=True)
            (args.work / f"whole-{seed}.json").write_text(json.dumps(uninterrupted(reference, seed)))
        whole, lengths = json.loads((args.work / f"whole-{seed}.json").read_text())
        folder = args.work / f"run-{runs}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)
        had: list[int] = []
        for _ in range(args.each):
            where = kill_once(folder, seed, rng, whole, lengths)
            if where is None:
                break
            kills[where] += 1
            has = checkpoint.iterations(folder) if folder.exists() else []
            lost += bool(had) and (not has or has[-1] < had[-1])
            had = has
        last = Life(folder, seed, resume=folder.exists())
        for _ in last.events(600):
            pass
        if last.wait():
            raise SystemExit(f"--resume failed: {folder.with_suffix('.log')}")
        place = difference(result(reference), result(folder))
        unequal += [f"{folder.name}: {place}"] if place else []
        runs += 1
        if place is None:
            shutil.rmtree(folder)
        figures = {
            "kills": kills.total(),
            "by moment": dict(kills),
            "runs": runs,
            "checkpoints lost": lost,
            "results unequal": unequal,
            "seconds": round(time.monotonic() - start),
            "settings": SETTINGS,
            "seed": args.seed,
        }
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
        left = (time.monotonic() - start) / kills.total() * max(args.kills - kills.total(), 0)
        print(
            f"{kills.total()}/{args.kills} kills in {runs} runs, {lost} checkpoints lost, {len(unequal)} results "
            f"unequal; {left / 60:.0f} min left",
            flush=True,
        )
    print(json.dumps(figures, indent=1))
    sys.exit(bool(lost or unequal))


if __name__ == "__main__":
    main()
