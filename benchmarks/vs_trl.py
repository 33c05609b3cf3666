"""`skillsd` compared with TRL's GRPOTrainer and with a hand-written floor: the same work, in one run.

The workload is in `contestants/workload.py`. Each contestant does it in its own process, one after the other, with one
thread, so CPU seconds and peak memory are its own. Contestants are interleaved within a round and their order rotates
from round to round, so noise on the machine hits all alike. Figures are medians over the rounds; growth with the number
of turns, and the peers' slow environments, are measured once. The benchmark checks that the work is equal and fails if
it is not: tokens sampled, trained on and processed in every step, and loss and gradient norm of two updates on a fixed
batch.

    python benchmarks/vs_trl.py [--turns 8 24] [--rounds 3] [--json benchmarks/results/vs_trl.json] [--quick]

TRL is installed into its own environment, `build/peers/trl`, which is created if it is missing (about 1 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "contestants"))

import workload as work  # noqa: E402  (plain Python, so this process stays small)
from comparison import STEP_SECONDS, TOLERANCE, Collected, Failure, Job, details, figures, markdown  # noqa: E402

TRL = "1.16.0"
PEER = ROOT / "build" / "peers" / "trl"
ROWS = 8
"""Sequences per forward pass in the updates of TRL and of the floor. Of 4, 8, 16 and 32, TRL was fastest with 8
(8 turns: 9.6, 8.8, 10.4, 11.5 CPU seconds per update), and more rows need more memory."""
GROWTH = (8, 16, 24, 32, 48, 64)

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours-grpo": ("ours.py", {"method": "grpo"}),
    "ours-skill-sd": ("ours.py", {"method": "skill-sd"}),
    "trl-rollout-func": ("trl_peer.py", {"variant": "rollout_func", "rows": ROWS}),
    "trl-environment-factory": ("trl_peer.py", {"variant": "environment_factory", "rows": ROWS}),
    "floor": ("floor.py", {"rows": ROWS}),
}
"""Contestant (see `comparison.ORDER`) -> its script, and the options that distinguish contestants of one script."""


# -------------------------------------------------------------------------------------------------- running jobs


def plan(contestants: Sequence[str], turns: Sequence[int], rounds: int, growth: Sequence[int]) -> list[Job]:
    """All jobs, in order: first the check that losses are equal, then the rounds."""
    jobs = []
    for name in ("ours-grpo", "trl-rollout-func", "floor"):
        if name in contestants:
            jobs.append(Job(name, "loss", (), {"job": "loss"}, 20))
    for number in range(rounds):
        order = [*contestants[number % len(contestants) :], *contestants[: number % len(contestants)]]
        for count in turns:
            for name in order:
                steps = 1 if name.startswith("trl") or count > 8 else 2  # noise weighs more on short measurements
                options = {"job": "step", "turns": count, "steps": steps, **STEPS[name][1]}
                jobs.append(Job(name, "step", (count,), options, _cost(name, count)))
            if {"ours-grpo", "ours-skill-sd"} <= {*contestants}:
                pairs = 3 if count <= 8 else 1
                options = {"job": "pair", "turns": count, "steps": pairs}
                jobs.append(Job("ours-skill-sd", "pair", (count,), options, 2.5 * pairs * _cost("ours-grpo", count)))
        for name in order:
            if name in ("ours-grpo", "floor") and number == 0:  # minutes; once will do for a fit over many points
                options = {"job": "rollout", "turns": list(growth)}
                jobs.append(Job(name, "growth", tuple(growth), options, sum(growth) * 0.6))
            if name == "ours-grpo":
                options = {"job": "rollout", "turns": list(turns), "environment_seconds": [0.0, STEP_SECONDS]}
                jobs.append(Job(name, "slow", tuple(turns), options, sum(turns)))
            if name.startswith("trl") and number == 0:  # minutes of sleeping; once is enough
                for count in turns[:1]:
                    options = {"job": "rollout", "turns": count, "environment_seconds": STEP_SECONDS}
                    options["variant"] = STEPS[name][1]["variant"]
                    jobs.append(Job(name, "slow", (count,), options, count * 3.2 + _cost(name, count) * 0.7))
    return jobs


def _cost(contestant: str, turns: int) -> float:
    if contestant.startswith("trl"):
        return 20 + 2.5 * turns + 0.2 * turns**2
    return 15 + 2.5 * turns


def run(job: Job, model: Path, pythons: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a job and return its result: JSON on the last line of its output."""
    script, _ = STEPS[job.contestant]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [pythons[script], str(HERE / "contestants" / script), json.dumps({"model": str(model), **job.options})]
    with log.open("a", encoding="utf-8") as errors:
        errors.write(f"\n== {job.contestant}, {json.dumps(job.options)}\n")
        errors.flush()
        begin = errors.tell()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[begin:].strip().splitlines()[-15:]
        raise Failure(f"{job.contestant} failed at {json.dumps(job.options)}:\n" + "\n".join(tail))
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_python(given: Path | None) -> str:
    """An interpreter with TRL: the given one, or that of `PEER`, which is created if needed."""
    if given is not None:
        found = subprocess.run([given, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
        if found.returncode or found.stdout.strip() != TRL:
            has = f"TRL {found.stdout.strip()}" if found.stdout.strip() else "no TRL"
            raise Failure(f"--peer-python {given} has {has}; expected TRL {TRL}: install trl=={TRL} there, or omit it")
        return str(given)
    python, ready = PEER / "bin" / "python", PEER / ".ready"
    if not ready.is_file():
        print(f"installing TRL {TRL} into {PEER.relative_to(ROOT)} (minutes, about 1 GB) ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", PEER], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "torch>=2.9,<2.14", f"trl=={TRL}"], check=True)
        ready.touch()
    return str(python)


def machine(pythons: dict[str, str]) -> dict[str, Any]:
    """The machine and the versions."""

    def ask(command: Sequence[str]) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    source = ask([pythons["ours.py"], "-c", "import skillsd; print(skillsd.__file__)"])
    git = ["git", "-C", str(Path(source).parent)]
    peer = "import trl, transformers, torch; print(trl.__version__, transformers.__version__, torch.__version__)"
    theirs = ask([pythons["trl_peer.py"], "-c", peer]).split() if "trl_peer.py" in pythons else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg(),
        "python": platform.python_version(),
        "ours": {name: version(name) for name in ("torch", "transformers")},
        "peer": dict(zip(("trl", "transformers", "torch"), theirs, strict=False)),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": ask([*git, "rev-parse", "HEAD"]),
        "uncommitted_changes": bool(ask([*git, "status", "--porcelain", "--", "."])),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []


# ------------------------------------------------------------------------------------------------------------ main


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--turns", type=int, nargs="+", default=None, help="turns per episode (default: 8 24)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--contestants", nargs="+", default=list(STEPS), help=f"some of: {', '.join(STEPS)}")
    where = f"an interpreter with TRL {TRL} (default: the one in {PEER.relative_to(ROOT)}, created if needed)"
    parser.add_argument("--peer-python", type=Path, help=where)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one round of 4 turns")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the tables of an existing file")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.contestants if name not in STEPS]:
        parser.error(f"unknown contestant {unknown[0]!r}; choose from: {', '.join(STEPS)}")
    options.contestants = list(dict.fromkeys(options.contestants))
    options.turns = list(dict.fromkeys(options.turns or ([4] if options.quick else [8, 24])))
    if wrong := [count for count in options.turns if not 2 <= count <= 64]:
        parser.error(
            f"--turns is {wrong[0]}, expected 2 to 64: more do not fit into the model's {work.MAX_LENGTH} positions"
        )
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    if options.quick:
        options.rounds = 1
    return options


def main(options: argparse.Namespace) -> None:
    if options.table:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    pythons = {"ours.py": sys.executable, "floor.py": sys.executable}
    if any(name.startswith("trl") for name in options.contestants):
        pythons["trl_peer.py"] = peer_python(options.peer_python)
    where = machine(pythons)
    jobs = plan(options.contestants, options.turns, options.rounds, (2, 4, 8) if options.quick else GROWTH)
    log = ROOT / "build" / "vs_trl.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("", encoding="utf-8")
    collected, begin = Collected(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        # In its own process: a child's peak memory starts at its parent's, so this process must stay small.
        write = (
            f"import sys; sys.path.insert(0, {str(HERE / 'contestants')!r}); import workload; from pathlib import Path"
        )
        command = [sys.executable, "-c", f"{write}; workload.make_model(Path({str(model)!r}))"]
        subprocess.run(command, check=True, capture_output=True)
        for number, job in enumerate(jobs, 1):
            line = collected.add(job, run(job, model, pythons, log))
            spent, done = time.monotonic() - begin, sum(j.cost for j in jobs[:number])
            left = spent / done * sum(j.cost for j in jobs[number:])
            turns = f"{'/'.join(map(str, job.turns))} turns, " if job.turns and job.kind in ("step", "pair") else ""
            print(
                f"[{number:3}/{len(jobs)}, {left / 60:4.1f} min left] {job.contestant}, {job.kind}: {turns}{line}",
                flush=True,
            )
            if options.json:  # after every job, so that a late failure does not lose an hour of figures
                keep(options.json, summary(collected, options, where, jobs_done=number, jobs=len(jobs)))
    results = summary(collected, options, where, jobs_done=len(jobs), jobs=len(jobs))
    if options.json:
        print(f"wrote {options.json}")
    print(f"\n{markdown(results)}")


def summary(
    collected: Collected, options: argparse.Namespace, where: dict[str, Any], *, jobs_done: int, jobs: int
) -> dict[str, Any]:
    """All figures so far, and how they were measured."""
    return {
        **figures(collected, options.turns),
        "work": {
            "tokens_a_step": {str(count): work.expected_tokens(count) for count in options.turns},
            "two_updates": collected.losses,
            "tolerance": TOLERANCE,
        },
        "detail": details(collected),
        "rounds": options.rounds,
        "complete": jobs_done == jobs,
        "machine": where,
    }


def keep(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(parse())
    except Failure as failure:
        raise SystemExit(f"error: {failure}") from None
