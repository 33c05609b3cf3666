"""The command line. Every mistake of the user's gets one clear line; no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console

from skillsd import __version__
from skillsd import config as configs
from skillsd.errors import UserError, unknown_name

app = typer.Typer(
    help="Skill-SD: skill-conditioned self-distillation for multi-turn LLM agents (arXiv 2604.10674).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
skills_app = typer.Typer(help="Look into a skill bank.", no_args_is_help=True)
envs_app = typer.Typer(help="Environments: list them, play them, set them up.", no_args_is_help=True)
models_app = typer.Typer(help="Models that go by a name: list them, fetch them ahead.", no_args_is_help=True)
app.add_typer(skills_app, name="skills")
app.add_typer(models_app, name="models")
app.add_typer(envs_app, name="envs")


def _console(stream: str) -> Console:
    # Texts are shown as they are: a model's words may hold what rich takes for markup. A file or a pipe has no width.
    wide = None if getattr(sys, stream).isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stream == "stderr", markup=False, emoji=False, width=wide)


console = _console("stdout")
errors = _console("stderr")

_UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
"""click's; newer versions of typer have their own."""

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads this at run time)
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's, e.g. training.learning_rate=1e-4"),
]


def main() -> None:
    """The entry point `skillsd`."""
    # Tokenizers would warn about their own threads whenever this process starts another one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(prog_name="skillsd", standalone_mode=False) or 0
    except UserError as error:
        _fail(str(error))
    except _UsageError as error:
        if error.__class__.__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "skillsd"
        _fail(f"{error.format_message()} ({command} --help)")
    except OSError as error:
        what = error.strerror or " ".join(str(error).split()) or type(error).__name__
        _fail(what if error.filename is None else f"{str(error.filename)!r}: {what}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except RuntimeError as error:
        from skillsd.engines.vllm.client import WorkerError  # here: few commands have to do with it

        if not isinstance(error, WorkerError):
            raise
        _fail(str(error))
    if code == 130:
        errors.print("stopped")
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    errors.print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`skillsd recipes`) or the path of a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The run's folder [runs/NAME-METHOD-seedN].")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
) -> None:
    """Train a policy."""
    from skillsd.report.progress import Bars, summaries_note, training_note
    from skillsd.report.tables import percent
    from skillsd.training.session import default_folder, run_training

    config = configs.load(configs.RunConfig, recipe, overrides or ())
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
        console.print(f"stopped and saved. To go on: {again}", soft_wrap=True, highlight=False)
        sys.exit(130)


@app.command("eval")
def evaluate(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[RUN] [KEY=VALUE]...", help="A run's folder; or, with --model, settings of the recipe."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A model that is not a run's: a name, a folder, or its name at --endpoint."),
    ] = None,
    recipe: Annotated[Optional[str], typer.Option(help="Environment and budgets for --model.")] = None,  # noqa: UP045
    endpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="URL", help="Where --model answers to OpenAI's chat completions, e.g. http://host:8000/v1"
        ),
    ] = None,
    key_env: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Environment variable that holds the endpoint's key."),
    ] = None,
    request: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="YAML", help="More fields of the requests, e.g. '{reasoning_effort: low}'."),
    ] = None,
    price_in: Annotated[Optional[float], typer.Option(help="Of a million tokens sent.")] = None,  # noqa: UP045
    price_out: Annotated[Optional[float], typer.Option(help="Of a million tokens answered.")] = None,  # noqa: UP045
    budget_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Ask no more after so many tokens in all."),
    ] = None,
    requests_per_minute: Annotated[Optional[float], typer.Option(help="Ask no faster.")] = None,  # noqa: UP045
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 120.0,
    split: Annotated[str, typer.Option(help="Panel to play.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Sampled episodes per task.")] = 1,
    temperature: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(min=0, help="Of sampling; may be repeated. [the recipe's, and 0: greedily]"),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Only so many of the panel's tasks, evenly spread."),
    ] = None,
    at: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(metavar="ITERATION", help="This checkpoint of a run instead of the last one; may be repeated."),
    ] = None,
    episodes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep finished episodes in this file and go on from it. [runs/eval-... for an endpoint]"),
    ] = None,
    json_out: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
    append: Annotated[
        bool, typer.Option("--append", help="Leave what the file of --json holds of other evaluations in it.")
    ] = False,
) -> None:
    """Score a run's checkpoint, or any model, here or remote, on a panel: sampled and greedily, with 95 % intervals."""
    if append and not json_out:
        raise UserError("--append is for the file of --json, which is not given")
    for path in filter(None, (json_out, episodes)):
        _check_writable(path)  # now, not after minutes of playing
    given = list(words or ())
    run = given.pop(0) if given and model is None else None
    options = {
        "base_url": endpoint, "api_key_env": key_env, "price_in": price_in, "price_out": price_out,
        "budget_tokens": budget_tokens, "requests_per_minute": requests_per_minute,
    }  # fmt: skip
    if endpoint is None and (request or any(value is not None for value in options.values())):
        raise UserError("these settings are for a model behind an --endpoint, which is not given")
    if endpoint is not None and model is None:
        raise UserError(f"--model names the model that {endpoint} is to be asked for, and is not given")
    from skillsd.evals import run_eval

    run_eval(
        console,
        run=run,
        model=model,
        endpoint={**options, "timeout_seconds": timeout, "request": _mapping(request)} if endpoint else None,
        recipe=recipe,
        overrides=given,
        split=split,
        samples=samples,
        limit=limit,
        at=at or (),
        temperatures=temperature or (),
        episodes=episodes,
        json_out=json_out,
        append=append,
    )


def _mapping(text: str | None) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text or "{}")
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"--request is {text!r}: expected fields with values, e.g. '{{reasoning_effort: low}}'")
    return value


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Option(help="The new model folder.")],
    at: Annotated[Optional[int], typer.Option(metavar="ITERATION", help="Another checkpoint than the last.")] = None,  # noqa: UP045
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapter of a LoRA run to its base model.")] = False,
) -> None:
    """Write a run's trained model (under LoRA its adapter) as a folder that `transformers` and `peft` load."""
    from skillsd.training.export import export as write

    write(run, out, iteration=at, merge=merge)
    console.print(f"{out}/", highlight=False)


@app.command()
def sft(
    recipe: Annotated[str, typer.Argument(help="A warm-start recipe: a name or the path of a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The new model's folder [models/NAME].")] = None,  # noqa: UP045
) -> None:
    """Warm start: supervised training on an environment's demonstrations, with and without a skill in the prompt."""
    from skillsd.report.progress import Bars
    from skillsd.report.tables import percent, table
    from skillsd.training.warm_start import run_sft

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


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds per method.")] = 1,
) -> None:
    """Train the tiny agent on Sokoban with GRPO and with Skill-SD, and compare: minutes on two CPU cores."""
    from skillsd.demo import run_demo

    run_demo(out, range(seeds), overrides or (), console)


@app.command("table")
def make_table(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`skillsd recipes`) or the path of a YAML file.")],
    overrides: Overrides = None,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Rows of `skillsd methods` and labels of the variants, by commas [grpo,skill-sd]."),
    ] = None,
    variants: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A YAML file of labels with settings over the recipe, or one of the package by name."),
    ] = None,
    models: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Names or folders of base models, by commas [the recipe's]."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each method on each base model.")] = 1,
    episodes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Training budgets, by commas, a table each [the recipe's length]."),
    ] = None,
    split: Annotated[str, typer.Option(help="Panel of the table.")] = "test",
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Count only so many of the panel's tasks, evenly spread."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sampled episodes per task.")] = 1,
    jobs: Annotated[Optional[int], typer.Option(min=1, help="Runs at once [cores / model.threads].")] = None,  # noqa: UP045
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Method that the others are compared with [grpo]."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Where everything goes [runs/table-NAME].")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is there and what would run.")] = False,
) -> None:
    """Compare methods on the same budgets of episodes: train what is missing, evaluate, show a table."""
    from skillsd.study.plan import plan
    from skillsd.study.table import run_table, show_plan

    study = plan(
        recipe,
        overrides or (),
        out or Path("runs") / f"table-{Path(recipe).stem}",
        methods=_listed(methods, "--methods"),
        variants=variants,
        models=_listed(models, "--models"),
        seeds=range(seeds),
        episodes=_numbers(episodes, "--episodes"),
        split=split,
        samples=samples,
        limit=limit,
        against=against,
    )
    if dry_run:
        show_plan(study, console)
    elif not run_table(study, console, jobs=jobs):
        sys.exit(1)


def _listed(text: str | None, option: str) -> list[str] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError(f"{option} is {text!r}: expected names with commas between them")
    return words


def _numbers(text: str | None, option: str) -> list[int] | None:
    words = _listed(text, option)
    if words is None:
        return None
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{option} is {text!r}: expected whole numbers with commas between them, e.g. 1536,3072")
    return [int(word) for word in words]


@app.command()
def methods() -> None:
    """List the methods: each a row of switches over the same loop."""
    from skillsd.methods import METHODS, methods_table

    console.print(methods_table(), highlight=False, soft_wrap=True)
    for row in METHODS.values():
        console.print(f"{row.name}: {row.description}", highlight=False)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    for name in configs.recipes():
        first = (configs.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        console.print(f"{name:16} {first.lstrip('# ')}", highlight=False)


@app.command()
def doctor(
    recipe: Annotated[Optional[str], typer.Argument(help="Also check this recipe.")] = None,  # noqa: UP045
    overrides: Overrides = None,
) -> None:
    """What is installed, which device there is, and what would fit."""
    from skillsd.doctor import examine

    examine(console, configs.load(configs.RunConfig, recipe, overrides or ()) if recipe else None)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__, highlight=False)


# -- skills ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bank(target: Path) -> Iterator[Any]:
    from skillsd.skills.bank import SkillBank

    path = target / "skills.sqlite" if target.is_dir() else target
    if not path.is_file():
        raise UserError(f"no skill bank in {str(target)!r}: give a run's folder or the file skills.sqlite of one")
    with SkillBank(path) as bank:
        yield bank


Target = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a skill bank's file.")]


@skills_app.command("list")
def skills_list(
    target: Target,
    task: Annotated[Optional[str], typer.Option(help="Only this task's.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=1, help="The most lines.")] = 50,
) -> None:
    """A line per skill, those that taught the best rewards first."""
    from skillsd.report.tables import short, table

    with _bank(target) as bank:
        stored = bank.skills(task)
    if not stored:
        raise UserError(f"no skills{f' of task {task!r}' if task else ''} in {str(target)!r}")
    stored.sort(key=lambda s: (-(s.credited > 0), -s.mean_reward, s.id))
    rows = [
        [
            str(s.id),
            s.task_id,
            s.source_outcome.value,
            f"{s.source_reward:.2f}",
            str(s.picks),
            f"{s.mean_reward:.2f}" if s.credited else "-",
            short(s.skill.golden_workflow or s.skill.mistake_analysis or s.skill.success_analysis),
        ]
        for s in stored[:limit]
    ]
    columns = ["id", "task", "written from", "its reward", "picked", "mean credit", "says"]
    more = f"{len(stored) - limit} more: --limit" if len(stored) > limit else ""
    words = ("task", "written from", "says")
    console.print(table(f"{len(stored)} skills", columns, rows, more, words))


@skills_app.command("show")
def skills_show(target: Target, skill: Annotated[int, typer.Argument(help="Its id in `skills list`.")]) -> None:
    """One skill in full, with where it came from and how it did."""
    with _bank(target) as bank:
        found = next((s for s in bank.skills() if s.id == skill), None)
        known = [str(s.id) for s in bank.skills()]
    if found is None:
        raise UserError(f"no skill {skill} in {str(target)!r}; ids go from {known[0]} to {known[-1]}" if known else
                        f"the bank {str(target)!r} is empty")  # fmt: skip
    console.print(json.dumps(_as_json(found), indent=2, ensure_ascii=False), highlight=False, soft_wrap=True)


@skills_app.command("export")
def skills_export(
    target: Target,
    to: Annotated[Optional[Path], typer.Argument(help="A .jsonl file; standard output if not given.")] = None,  # noqa: UP045
) -> None:
    """All skills as JSON lines."""
    if to is not None:
        _check_writable(to)
    with _bank(target) as bank:
        lines = "".join(json.dumps(_as_json(s), ensure_ascii=False) + "\n" for s in bank.skills())
    if to is None:
        sys.stdout.write(lines)
    else:
        to.write_text(lines, encoding="utf-8")
        console.print(f"{lines.count(chr(10))} skills -> {to}")


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
At = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="ITERATION|base", help="Another checkpoint than the last, or the untrained model."),
]


@skills_app.command("uplift")
def skills_uplift(
    target: RunFolder,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes with each skill, and as many without.")] = 8,
    at: At = None,
    task: Annotated[Optional[str], typer.Option(help="Only this task's skills.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only so many skills, the newest.")] = None,  # noqa: UP045
    never_picked: Annotated[bool, typer.Option("--all", help="Also the skills that were never picked.")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="The teacher's weights play, not the student's.")] = False,
    seed: Annotated[int, typer.Option(help="Of the episodes.")] = 0,
    json_out: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """What the skills are worth: success with one in the prompt minus success without, on its own training task."""
    from skillsd.worth import show_uplift

    if json_out:
        _check_writable(json_out)  # now, not after minutes of playing
    show_uplift(
        console, target, episodes=episodes, seed=seed, at=at, task=task, limit=limit, never_picked=never_picked,
        weights="teacher" if teacher else "student", json_out=json_out,
    )  # fmt: skip


@skills_app.command("gap")
def skills_gap(
    target: RunFolder,
    tasks: Annotated[Optional[int], typer.Option(min=1, help="Only so many training tasks, at random.")] = None,  # noqa: UP045
    episodes: Annotated[int, typer.Option(min=1, help="The student's episodes of each task.")] = 4,
    at: At = None,
    teacher: Annotated[str, typer.Option(help="`run`: the run's teacher; `base`: the untrained model.")] = "run",
    seed: Annotated[int, typer.Option(help="Of the episodes.")] = 0,
    json_out: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """Where the teacher, told a skill, differs from the student: by turn, outcome and kind of skill."""
    from skillsd.worth import show_gap

    if json_out:
        _check_writable(json_out)
    show_gap(console, target, episodes=episodes, seed=seed, at=at, tasks=tasks, teacher=teacher, json_out=json_out)


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} for {path.name!r}")


def _as_json(stored: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(stored), "source_outcome": stored.source_outcome.value, "mean_reward": stored.mean_reward}


# -- models ---------------------------------------------------------------------------------------------------------


@models_app.command("list")
def models_list() -> None:
    """Names for model.name beside folders and hub names, and where each model lies."""
    from skillsd.engines.torch.models import SHIPPED
    from skillsd.engines.torch.pretrained import NAMES, kept

    for name, path in SHIPPED.items():
        console.print(f"{name:16} shipped: {path}", highlight=False, soft_wrap=True)
    for name, what in NAMES.items():
        console.print(f"{name:16} {what}: {kept(name) or 'not fetched yet'}", highlight=False, soft_wrap=True)


@models_app.command("fetch")
def models_fetch(name: Annotated[str, typer.Argument(help="A name of `skillsd models list`.")]) -> None:
    """Fetch a model now, so that no run has to; prints its folder."""
    from skillsd.engines.torch.models import SHIPPED, resolve
    from skillsd.engines.torch.pretrained import NAMES

    if name not in (*SHIPPED, *NAMES):
        raise unknown_name("model", name, (*SHIPPED, *NAMES))
    console.print(resolve(name), highlight=False, soft_wrap=True)


# -- environments ---------------------------------------------------------------------------------------------------


@envs_app.command("list")
def envs_list() -> None:
    """Registered environments with their splits."""
    from skillsd.envs import registry

    for name in registry.names():
        try:
            task_set = registry.load(name)
            splits = ", ".join(f"{split} {len(task_set.tasks(split))}" for split in task_set.splits)
        except Exception as error:  # someone else's package: the others are listed all the same
            splits = f"does not load: {error}"
        console.print(f"{name:16} {splits}", highlight=False)


@envs_app.command("play")
def envs_play(
    name: Annotated[str, typer.Argument(help="An environment (`skillsd envs list`).")],
    options: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[OPTION=VALUE]...", help="Options of the environment, e.g. preset=paper"),
    ] = None,
    split: Annotated[str, typer.Option(help="Which tasks.")] = "train",
    task: Annotated[str, typer.Option(help="A task's number in the split, or its id.")] = "0",
) -> None:
    """Play a task yourself."""
    import yaml

    from skillsd.envs import registry
    from skillsd.envs.play import play

    given: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{option!r} is no option: write option=value, e.g. preset=paper")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {option!r} is not readable as YAML") from error
    if name not in registry.names() and ":" not in name:
        raise unknown_name("environment", name, registry.names())
    play(registry.load(name, given).for_people(), split, int(task) if task.isdecimal() else task)


@envs_app.command("setup")
def envs_setup(
    name: Annotated[str, typer.Argument(help="An environment that needs more than this package: appworld.")],
    data: Annotated[Optional[Path], typer.Option(help="A folder with official data: check it.")] = None,  # noqa: UP045
    python: Annotated[Optional[str], typer.Option(help="The Python to set up with [this one].")] = None,  # noqa: UP045
) -> None:
    """Install once what an environment runs on, in the cache folder; what is there already is left alone."""
    from skillsd.envs import registry

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    registry.setup_of(name)(say, data=data, python=python)


if __name__ == "__main__":
    main()
