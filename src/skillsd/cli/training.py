"""`skillsd train`, `skillsd sft`, `skillsd export`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd import config as configs
from skillsd.cli.common import SETTING, Overrides, Recipe, RunFolder, console, note_ineffective
from skillsd.cli.report import write_at_end
from skillsd.engines.torch.ranks import launched


def add_to(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(sft)
    app.command()(export)


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the run.", show_default="runs/NAME-METHOD-seedN"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder.")] = False,
    gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Train in N processes, each on a GPU (engine.shard; docs/scale.md)."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="With --gpus: how often to go on after a process has died.")
    ] = 3,
) -> None:
    """Train a policy with a recipe."""
    if gpus is not None:
        from skillsd.cli.launch import launch

        config = configs.load(configs.RunConfig, recipe, overrides or ())
        arguments = [recipe, *(overrides or ()), "--out", str(out or _folder(config)), *["--resume"][: int(resume)]]
        sys.exit(launch(config, arguments, gpus, max_restarts))
    if launched.size() == 1:
        _train(recipe, overrides, out, resume)
        return
    from skillsd.engines.torch.ranks.group import led_here

    with led_here() as here:
        if here:
            if launched.restarts():
                console.print(f"note: the ranks were started again ({launched.restarts()}), after one of them failed")
            _train(recipe, overrides, out, resume or launched.restarts() > 0)


def _folder(config: configs.RunConfig) -> Path:
    from skillsd.runs.lifecycle import default_folder

    return default_folder(config)


def _train(recipe: str, overrides: list[str] | None, out: Path | None, resume: bool) -> None:
    from skillsd.report.progress import Bars, summaries_note, training_note
    from skillsd.report.tables import percent
    from skillsd.runs.closing import closing
    from skillsd.runs.lifecycle import default_folder, run_training
    from skillsd.training.health import symptoms

    config = configs.load(configs.RunConfig, recipe, overrides or ())
    note_ineffective([config], overrides)
    folder = out or default_folder(config)
    console.print(f"{config.name}: {config.method}, seed {config.seed} -> {folder}/", highlight=False)
    bars = Bars(console)
    spent: str | None = None

    def on_record(kind: str, record: Mapping[str, Any]) -> None:
        nonlocal spent
        if kind == "iteration":
            spent = summaries_note(record)
            note = training_note(record, symptoms(record))
            bars.update("training", record["iteration"], config.training.iterations, note)
        elif not record["eval/tasks"]:
            bars.print(f"  after {record['episodes']:,.0f} episodes: not measured, as no task could be played")
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
    for line in [*([spent] if spent else []), *closing(folder)]:
        console.print(line, highlight=False, soft_wrap=True)
    write_at_end(folder)
    if finished:
        console.print(f"done: {folder}/  (next: skillsd eval {folder})")
    else:
        ranks = ["--gpus", str(launched.size())] if launched.size() > 1 else []
        again = shlex.join(["skillsd", "train", recipe, *(overrides or ()), "--out", str(folder), "--resume", *ranks])
        console.print(f"stopped and saved. To resume: {again}", soft_wrap=True, highlight=False)
        sys.exit(130)


def sft(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="Name of a warm-start recipe (`skillsd recipes`), or path of a YAML file."
        ),
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar=SETTING,
            help="Settings that override the recipe's, e.g. warm_start.batch=8 (`skillsd config --sft` lists them).",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the new model.", show_default="models/NAME"),
    ] = None,
) -> None:
    """Warm-start a model on demonstrations.

    Supervised training, with and without a skill in the prompt, and a check of how well the model follows skills.
    """
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
    console.print("Worth training further only if a golden skill helps a lot and another task's skill does not.")


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder of the exported model.")],
    at: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="ITERATION", help="Checkpoint to export.", show_default="the last"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter of a LoRA run into its base model.")
    ] = False,
) -> None:
    """Export a run's trained model as a model folder.

    `transformers` loads it; for a LoRA run it is an adapter, which `peft` loads.
    """
    from skillsd.runs.export import export as write

    write(str(run), out, iteration=at, merge=merge)
    console.print(f"{out}/", highlight=False)
