"""Speed, memory and doubles of the text games' engines.

    .venv/bin/python benchmarks/textgames.py speed --json benchmarks/results/textgames.json
    .venv/bin/python benchmarks/textgames.py doubles textworld-express --first 200
    .venv/bin/python benchmarks/textgames.py doubles scienceworld --rows build/scienceworld-doubles.jsonl

`speed` plays the engine's own solutions of training tasks, 16 at once, with 1, 2 and 4 hosts, in alternating rounds.
The hosts are started before. Opening a game and stepping it are timed from outside, so waiting for a turn at the host
counts; per second, they count all episodes of a round. Memory (PSS) and CPU time are those of all hosts, Java included.

`doubles` counts the held-out tasks that are in the training split too, word for word: by their first prompt, and by the
whole game (TextWorld-Express: all texts of the gold path; ScienceWorld: all objects with their properties). It takes
half a second a variation in ScienceWorld; --rows keeps what is done, and continues there.

Needs `skillsd envs setup textworld-express` and `skillsd envs setup scienceworld`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import cpu_seconds, memory_mib

from skillsd.envs.base import evenly_spaced
from skillsd.envs.scienceworld import ScienceWorld
from skillsd.envs.scienceworld.environment import VENV as SCIENCE
from skillsd.envs.scienceworld.variations import TASKS, folds
from skillsd.envs.textgames import prompt
from skillsd.envs.textgames.engine import pool
from skillsd.envs.textgames.environment import TextGames
from skillsd.envs.textworld_express import TextWorldExpress, listing
from skillsd.envs.textworld_express.environment import GAMES
from skillsd.envs.textworld_express.venv import VENV as EXPRESS
from skillsd.report.manifest import commit, processor
from skillsd.types import Task

HOSTS = (1, 2, 4)
AT_ONCE = 16


def task_set(name: str, hosts: int) -> TextGames:
    if name == "scienceworld":
        return ScienceWorld(variations=1, hosts=hosts)
    return TextWorldExpress(train=4, dev=1, test=1, hosts=hosts)


async def episode(games: TextGames, task: Task, commands: Sequence[str]) -> tuple[float, list[float], bool]:
    """Seconds of the opening and of each step, and whether it was a success."""
    environment = games.make()
    begin = time.perf_counter()
    await environment.reset(task, 0)
    opening, steps, success = time.perf_counter() - begin, [], False
    for command in commands:
        begin = time.perf_counter()
        step = await environment.step(prompt.written(games.style, command))
        steps.append(time.perf_counter() - begin)
        success = step.success
        if step.done:
            break
    await environment.close()
    return opening, steps, success


async def played(games: TextGames, plays: Sequence[tuple[Task, Sequence[str]]]) -> dict[str, Any]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(task: Task, commands: Sequence[str]) -> tuple[float, list[float], bool]:
        async with slots:
            return await episode(games, task, commands)

    begin = time.perf_counter()
    results = await asyncio.gather(*(one(*play) for play in plays))
    seconds = time.perf_counter() - begin
    steps = [second for _, each, _ in results for second in each]
    return {
        "episodes_per_second": len(results) / seconds,
        "steps_per_second": len(steps) / seconds,
        "opening_seconds": statistics.median(opening for opening, _, _ in results),
        "step_seconds": statistics.median(steps),
        "solved": sum(success for _, _, success in results),
        "episodes": len(results),
        "steps": len(steps),
    }


def speed(name: str, rounds: int, tasks: int) -> list[dict[str, Any]]:
    sets = {hosts: task_set(name, hosts) for hosts in HOSTS}
    chosen = evenly_spaced(sets[1].tasks("train"), tasks)
    plays = [(task, list(sets[1].gold(task))[: sets[1].max_turns]) for task in chosen]
    rows = []
    for number in range(rounds):
        for hosts, games in sets.items():
            for host in games.pool().hosts:
                host.ensure()
            pids = [host.pid for host in games.pool().hosts if host.pid is not None]
            before = cpu_seconds(pids)
            row = {"engine": name, "hosts": hosts, "round": number, **asyncio.run(played(games, plays))}
            row["hosts_cpu_seconds_per_episode"] = (cpu_seconds(pids) - before) / row["episodes"]
            row["memory_mib"] = memory_mib(pids)
            print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}), flush=True)
            rows.append(row)
            games.pool().stop()
    return rows


def doubles_express(first: int) -> None:
    games = TextWorldExpress(hosts=1)
    for game in GAMES:
        prompts: dict[str, Counter[str]] = {}
        texts: dict[str, Counter[str]] = {}
        for split in games.splits:
            seeds = games._ask("seeds", listing.REQUEST_SECONDS, {"seeds": list}, fold=split)["seeds"][:first]
            found = [
                entry
                for start in range(0, len(seeds), listing.CHUNK)
                for entry in listing.survey(games._ask, game, "", split, seeds[start : start + listing.CHUNK])
            ]
            prompts[split] = Counter(entry.prompt for entry in found)
            texts[split] = Counter(entry.texts for entry in found)
        report(game, prompts, texts)
    games.pool().stop()


def doubles_science(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(name, variation): (prompt, world) for name, variation, prompt, world in rows}
    hosts = pool(ScienceWorld.engine, 1)
    done = 0
    for name in sorted(TASKS, key=lambda name: TASKS[name][0]):
        missing = [variation for variation in range(TASKS[name][0]) if (name, variation) not in known]
        for start in range(0, len(missing), 10):
            chunk = missing[start : start + 10]
            found = hosts.any().ask("survey", 600, {"hashes": list}, task=name, variations=chunk)["hashes"]
            with path.open("a") as file:
                for variation, hashes in zip(chunk, found, strict=True):
                    known[name, variation] = tuple(hashes)
                    file.write(json.dumps([name, variation, *hashes]) + "\n")
            done += len(chunk)
            if done >= ScienceWorld.engine.recycle:
                hosts.stop()
                done = 0
        counts = [
            {fold: Counter(known[name, variation][which] for variation in folds(name)[fold]) for fold in folds(name)}
            for which in (0, 1)
        ]
        report(name, *counts)
    hosts.stop()


def report(name: str, prompts: dict[str, Counter[str]], games: dict[str, Counter[str]]) -> None:
    """A line: of the tasks of dev and test, how many have a twin in train."""
    parts = [name, *(f"{fold} {counts.total()}" for fold, counts in prompts.items())]
    for what, of_fold in (("first prompt", prompts), ("game", games)):
        twins = [sum(n for key, n in of_fold[fold].items() if key in of_fold["train"]) for fold in ("dev", "test")]
        parts.append(f"{what} also in train: {twins[0]} + {twins[1]}")
    print("; ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "doubles"])
    parser.add_argument("engines", nargs="*", default=["textworld-express", "scienceworld"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=30, help="tasks per round of `speed`")
    parser.add_argument("--first", type=int, default=200, help="seeds per fold of TextWorld-Express")
    parser.add_argument("--rows", type=Path, default=Path("build/scienceworld-doubles.jsonl"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "doubles":
        for name in arguments.engines:
            doubles_express(arguments.first) if name == "textworld-express" else doubles_science(arguments.rows)
        return
    rows = [row for name in arguments.engines for row in speed(name, arguments.rounds, arguments.tasks)]
    if arguments.json:
        made_with = {"processor": processor(), "commit": commit(), "engines": [EXPRESS.title, SCIENCE.title]}
        arguments.json.write_text(json.dumps({**made_with, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
