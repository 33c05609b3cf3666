"""`skillsd eval`: its options; see `eval_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd.cli.common import check_writable, console
from skillsd.errors import UserError


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


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
            metavar="URL", help="Where --model is served with OpenAI's chat completions, e.g. http://host:8000/v1"
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
    price_in: Annotated[Optional[float], typer.Option(help="Price of a million tokens sent.")] = None,  # noqa: UP045
    price_out: Annotated[Optional[float], typer.Option(help="Price of a million tokens answered.")] = None,  # noqa: UP045
    budget_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Send no more requests after this many tokens in all."),
    ] = None,
    requests_per_minute: Annotated[Optional[float], typer.Option(help="Highest rate of requests.")] = None,  # noqa: UP045
    timeout: Annotated[float, typer.Option(help="Deadline of one request in seconds.")] = 120.0,
    split: Annotated[str, typer.Option(help="Panel to play.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Sampled episodes per task.")] = 1,
    temperature: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(min=0, help="Sampling temperature; may be repeated. [the recipe's, and 0: greedy]"),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Only this many of the panel's tasks, evenly spaced."),
    ] = None,
    at: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(metavar="ITERATION", help="This checkpoint of a run instead of the last one; may be repeated."),
    ] = None,
    episodes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Log finished episodes in this file, and resume from it. [runs/eval-... for an endpoint]"),
    ] = None,
    json_out: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
    append: Annotated[
        bool, typer.Option("--append", help="Keep other evaluations that the file of --json holds.")
    ] = False,
) -> None:
    """Evaluate a run's checkpoint, or any local or remote model, on a panel: sampled and greedy, with intervals."""
    if append and not json_out:
        raise UserError("--append needs --json: the file to append to")
    for path in filter(None, (json_out, episodes)):
        check_writable(path)  # now, not after minutes of playing
    given = list(words or ())
    run = given.pop(0) if given and model is None else None
    options = {
        "base_url": endpoint, "api_key_env": key_env, "price_in": price_in, "price_out": price_out,
        "budget_tokens": budget_tokens, "requests_per_minute": requests_per_minute,
    }  # fmt: skip
    if endpoint is None and (request or any(value is not None for value in options.values())):
        raise UserError("these options are for a model behind an --endpoint, which is not given")
    if endpoint is not None and model is None:
        raise UserError(f"--endpoint needs --model: the model's name at {endpoint}")
    from skillsd.cli.eval_run import run_eval

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
