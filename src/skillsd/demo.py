"""`skillsd demo`: GRPO and Skill-SD side by side on the same budget of episodes, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.envs import registry
from skillsd.errors import UserError
from skillsd.report.pictures import learning_curves
from skillsd.report.progress import Bars, duration, training_note
from skillsd.report.tables import percent, table
from skillsd.report.writer import EVALUATIONS, METRICS, read
from skillsd.skills.bank import SkillBank
from skillsd.training.evaluate import Evaluation, mean_interval
from skillsd.types import Trajectory

RECIPE = "sokoban-nano"
METHODS = ("grpo", "skill-sd")
SPLIT = "test"
POLL_SECONDS = 0.5

Scores = tuple[Evaluation, Evaluation]
"""Sampled at the training temperature, and greedily."""


def run_demo(folder: Path, seeds: Sequence[int], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Train each method on each seed, evaluate base and all on the test panel, and write ``summary.json``.

    Training runs are processes of their own, as many at once as there are cores; one that was done before is not
    repeated, one that was cut off goes on.

    Raises:
        UserError: if a training run fails, with what it said.
    """
    begin = time.perf_counter()
    config = configs.load(RunConfig, RECIPE, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    runs = {(method, seed): folder / f"{method}-seed{seed}" for seed in seeds for method in METHODS}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    console.print(
        f"Training {' and '.join(METHODS)} on {len(seeds)} seed{'s' * (len(seeds) > 1)}, "
        f"{config.training.iterations * config.rollout.tasks_per_iteration * config.rollout.group_size} episodes each, "
        f"{min(cores, len(runs))} at a time. Everything goes into {folder}/"
    )
    _train_all(runs, config, overrides, console, cores)
    scores = _evaluate_all(runs, config, console)
    summary = _summarise(runs, scores, config)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    picture = folder / "learning-curves.png"
    curves = {m: [read(runs[m, s] / EVALUATIONS) for s in seeds] for m in METHODS}
    learning_curves(curves, picture, title="Sokoban, tiny agent", split=config.evaluation.split)
    _show(summary, runs[METHODS[1], seeds[0]], picture, folder, console, time.perf_counter() - begin)
    return summary


def _train_all(
    runs: dict[tuple[str, int], Path], config: RunConfig, overrides: Sequence[str], console: Console, cores: int
) -> None:
    waiting = list(runs)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    bars = Bars(console)
    try:
        with bars.shown():
            while waiting or running:
                while waiting and len(running) < cores:
                    key = waiting.pop(0)
                    running[key] = _start(key, runs[key], overrides)
                time.sleep(POLL_SECONDS)
                for key in runs:
                    records = read(runs[key] / METRICS)
                    if records or key in running:
                        last = records[-1] if records else {"iteration": 0}
                        note = training_note(last) if records else "starting"
                        name = f"{key[0]:8} seed {key[1]}"
                        bars.update(name, last["iteration"], config.training.iterations, note)
                for key, process in list(running.items()):
                    if process.poll() is not None:
                        del running[key]
                        if process.returncode:
                            log = (runs[key].parent / f"{runs[key].name}.log").read_text(errors="replace")
                            raise UserError(f"training {runs[key]} failed:\n{log[-2000:]}")
    except KeyboardInterrupt:
        # A terminal's Ctrl-C reached the runs as well; SIGTERM tells those that it did not. They save and end.
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        console.print("stopped; everything so far is kept: the same command goes on from there")
        raise
    finally:
        for process in running.values():
            process.terminate()


def _start(key: tuple[str, int], folder: Path, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    method, seed = key
    command = [sys.executable, "-m", "skillsd", "train", RECIPE, *overrides]
    command += [f"method={method}", f"seed={seed}", "--out", str(folder), "--resume"]
    with open(folder.parent / f"{folder.name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def _evaluate_all(
    runs: dict[tuple[str, int], Path], config: RunConfig, console: Console
) -> dict[str, dict[int, Scores]]:
    """method (and ``base``) -> seed -> its figures on the test panel."""
    from skillsd.training.scoring import load_trained, load_untrained, score

    bars, done = Bars(console), 0
    scores: dict[str, dict[int, Scores]] = {"base": {}}
    jobs: list[tuple[str, int, Path | None]] = [("base", seed, None) for seed in sorted({seed for _, seed in runs})]
    jobs += [(method, seed, folder) for (method, seed), folder in runs.items()]
    tasks = len(registry.load(config.environment.name, config.environment.options).tasks(SPLIT))
    with bars.shown():
        for name, seed, folder in jobs:

            def on_episode(trajectory: Trajectory, name: str = name) -> None:
                nonlocal done
                done += 1
                bars.update(f"evaluating on {SPLIT}", done, 2 * tasks * len(jobs), name)

            engine = load_trained(str(folder))[0] if folder else load_untrained(config.model.name, config)
            temperatures = (config.rollout.temperature, 0.0)
            figures = score(engine, config, SPLIT, temperatures=temperatures, seed=seed, on_episode=on_episode)
            scores.setdefault(name, {})[seed] = (figures[0], figures[1])
    return scores


def _summarise(
    runs: dict[tuple[str, int], Path], scores: dict[str, dict[int, Scores]], config: RunConfig
) -> dict[str, Any]:
    first, _ = next(iter(scores["base"].values()))
    summary: dict[str, Any] = {
        "recipe": RECIPE,
        "split": SPLIT,
        "tasks": first.tasks,
        "fingerprint": first.fingerprint,
        "seeds": sorted(scores["base"]),
    }
    for name, by_seed in scores.items():
        figures = [sampled for sampled, _ in by_seed.values()]
        greedy = [played.accuracy for _, played in by_seed.values()]
        accuracies = [f.accuracy for f in figures]
        last = [read(runs[name, seed] / METRICS)[-1] for seed in by_seed] if name != "base" else []
        summary[name.replace("-", "_")] = {
            "accuracy": sum(accuracies) / len(accuracies),
            "completion": sum(f.completion for f in figures) / len(figures),
            # One seed: how sure the panel makes us. Several: how much training runs differ.
            "interval": figures[0].interval if len(figures) == 1 else mean_interval(accuracies),
            "completion_interval": figures[0].completion_interval
            if len(figures) == 1
            else mean_interval([f.completion for f in figures]),
            "accuracy_by_seed": accuracies,
            "greedy_accuracy": sum(greedy) / len(greedy),
            "greedy_accuracy_by_seed": greedy,
            "episodes": int(last[0]["episodes"]) if last else 0,
            "seconds": sum(record["seconds"] for record in last) / len(last) if last else 0.0,
        }
    return summary


def _show(
    summary: dict[str, Any], skill_run: Path, picture: Path, folder: Path, console: Console, seconds: float
) -> None:
    rows = []
    for name in ("base", *METHODS):
        row = summary[name.replace("-", "_")]
        rows.append(
            [
                name,
                percent(row["accuracy"], row["interval"]),
                percent(row["completion"], row["completion_interval"]),
                percent(row["greedy_accuracy"]),
                f"{row['episodes']:,}",
                duration(row["seconds"]) if row["episodes"] else "-",
            ]
        )
    caption = "Intervals over the panel's tasks. One seed shows that both learn, not which is better."
    if (seeds := len(summary["seeds"])) > 1:
        caption = f"Intervals over {seeds} training seeds (of the base: over {seeds} draws of its answers)."
    console.print()
    console.print(
        table(
            f"Held-out Sokoban levels ({summary['tasks']}, split {SPLIT}), sampled, plain prompt",
            ["method", "accuracy [95 %]", "completion [95 %]", "greedy", "episodes", "training"],
            rows,
            caption=caption,
        )
    )
    with SkillBank(skill_run / "skills.sqlite") as bank:
        stored = bank.skills()
    # The ones with a workflow say most to a reader.
    taught = sorted(
        (s for s in stored if s.credited), key=lambda s: (not s.skill.golden_workflow, -s.mean_reward, s.id)
    )[:3]
    console.print(f"\nThree of the {len(stored)} skills that it wrote for its teacher:")
    for skill in taught:
        console.print(f"  task {skill.task_id}, taught {skill.credited} episodes, mean reward {skill.mean_reward:.2f}")
        for field in ("success_analysis", "mistake_analysis", "golden_workflow"):
            if text := getattr(skill.skill, field):
                console.print(f"    {field}: {text}", highlight=False, markup=False)
    console.print(f"\nLearning curves: {picture}")
    console.print(f"All of it ({duration(seconds)}): {folder}/  (summary.json; skillsd skills list {skill_run})")
