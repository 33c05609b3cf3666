"""`skillsd train`, `skillsd sft`, `skillsd export`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd import config as configs
from skillsd.cli.common import Overrides, Recipe, console, note_ineffective


def add_to(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(sft)
    app.command()(export)


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The run's folder [runs/NAME-METHOD-seedN].")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the folder's last checkpoint.")] = False,
) -> None:
    """Train a policy."""
    from skillsd.report.progress import Bars, summaries_note, training_note
    from skillsd.report.tables import percent
    from skillsd.runs.lifecycle import default_folder, run_training

    config = configs.load(configs.RunConfig, recipe, overrides or ())
    note_ineffective(config, overrides)
    folder = out or default_folder(config)
    console.print(f"{config.name}: {config.method}, seed {config.seed} -> {folder}/", highlight=False)
    bars = Bars(console)
    spent: str | None = None

    def on_record(kind: str, record: Mapping[str, Any]) -> None:
        nonlocal spent
        if kind == "iteration":
            spent = summaries_note(record)
            bars.update("training", record["iteration"], config.training.iterations, training_note(record))
        else:
            accuracy = percent(record["eval/accuracy"], record["eval/interval"])
            completion = percent(record["eval/completion"])
            bars.print(
                f"  after {record['episodes']:,.0f} episodes: accuracy {accuracy}, completion {completion} "
                f"on {record['eval/tasks']} tasks ({record['eval/split']})"
            )

    with bars.shown():
        finished = run_training(
            config, folder, resume=resume, on_record=on_record, on_note=lambda text: bars.print(f"  note: {text}")
        )
    if spent:
        console.print(spent, highlight=False)
    if finished:
        console.print(f"done: {folder}/  (next: skillsd eval {folder})")
    else:
        again = shlex.join(["skillsd", "train", recipe, *(overrides or ()), "--out", str(folder), "--resume"])
        console.print(f"stopped and saved. To resume: {again}", soft_wrap=True, highlight=False)
        sys.exit(130)


def sft(
    recipe: Annotated[str, typer.Argument(help="A warm-start recipe: a name or the path of a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The new model's folder [models/NAME].")] = None,  # noqa: UP045
) -> None:
    """Warm start: supervised training on an environment's demonstrations, with and without a skill in the prompt."""
    from skillsd.report.progress import Bars
    from skillsd.report.tables import percent, table
    from skillsd.warm_start.check import run_sft

    config = configs.load(configs.SftConfig, recipe, overrides or ())
    folder = out or Path("models") / config.name
    bars = Bars(console)
    with bars.shown():
        figures = run_sft(
            config,
            folder,
            lambda p: bars.update("warm start", p.step, p.steps, f"loss {p.loss:.3f}"),
            lambda done, episodes: bars.update("check", done, episodes, config.check.split),
        )
    rows = [[row["prompt"], percent(row["sampled"], row["interval"]), percent(row["greedy"])] for row in figures]
    title = f"{folder} on {config.environment.name}, split {config.check.split}"
    console.print(table(title, ["prompt", "sampled [95 %]", "greedy"], rows))
    console.print("Worth training only if a good skill helps much and another task's does not.")


def export(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    at: Annotated[Optional[int], typer.Option(metavar="ITERATION", help="Another checkpoint than the last.")] = None,  # noqa: UP045
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapter of a LoRA run to its base model.")] = False,
) -> None:
    """Write a run's trained model (under LoRA its adapter) as a folder that `transformers` and `peft` load."""
    from skillsd.runs.export import export as write

    write(run, out, iteration=at, merge=merge)
    console.print(f"{out}/", highlight=False)
