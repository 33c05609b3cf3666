"""The options of `skillsd eval`; `eval_run` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from skillsd.cli.common import SETTING, JsonOut, check_writable, console
from skillsd.errors import UserError


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar=f"RUN|{SETTING}", help="A run's folder; or, with --model, settings that override the recipe's."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Evaluate this model instead of a run: a name, a folder, or its name at --endpoint."),
    ] = None,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Recipe that gives the environment and the token budgets for --model."),
    ] = None,
    endpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="URL", help="OpenAI-compatible endpoint that serves --model, e.g. http://host:8000/v1"),
    ] = None,
    key_env: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Environment variable that contains the endpoint's API key."),
    ] = None,
    request: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="YAML", help="Further fields of each request, e.g. '{reasoning_effort: low}'."),
    ] = None,
    price_in: Annotated[Optional[float], typer.Option(help="Price per million input tokens.")] = None,  # noqa: UP045
    price_out: Annotated[Optional[float], typer.Option(help="Price per million output tokens.")] = None,  # noqa: UP045
    budget_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Stop sending requests after this many tokens in total."),
    ] = None,
    requests_per_minute: Annotated[Optional[float], typer.Option(help="Maximum request rate.")] = None,  # noqa: UP045
    timeout: Annotated[float, typer.Option(help="Timeout of one request, in seconds.")] = 120.0,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Sampled episodes per task.")] = 1,
    temperature: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(
            min=0, help="Sampling temperature, 0 for greedy; can be repeated.", show_default="the recipe's, and 0"
        ),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Evaluate on only this many of the split's tasks, evenly spaced."),
    ] = None,
    at: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            metavar="ITERATION", help="Checkpoint of the run to evaluate; can be repeated.", show_default="the last"
        ),
    ] = None,
    episodes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Log finished episodes in this file and resume from it. Always on with --endpoint.",
            show_default="runs/eval-MODEL-ENVIRONMENT-SPLIT.jsonl with --endpoint",
        ),
    ] = None,
    json_out: JsonOut = None,
    append: Annotated[bool, typer.Option("--append", help="Keep the other evaluations in the --json file.")] = False,
) -> None:
    """Evaluate a checkpoint, a model or an endpoint.

    Reports accuracy and completion on a split of the environment, sampled and greedy, with 95 % intervals.
    """
    if append and not json_out:
        raise UserError("--append needs --json, the file to append to")
    for path in filter(None, (json_out, episodes)):
        check_writable(path)
    given = list(words or ())
    run = given.pop(0) if given and model is None else None
    remote = {
        "--key-env": key_env, "--request": request, "--price-in": price_in, "--price-out": price_out,
        "--budget-tokens": budget_tokens, "--requests-per-minute": requests_per_minute,
    }  # fmt: skip
    if endpoint is None and (useless := [option for option, value in remote.items() if value is not None]):
        raise UserError(f"{', '.join(useless)}: only for a model behind an endpoint, which needs --endpoint URL")
    if endpoint is not None and model is None:
        raise UserError(f"--endpoint needs --model: the model's name at {endpoint}")
    from skillsd.cli.eval_run import run_eval

    settings = {
        "base_url": endpoint, "api_key_env": key_env, "price_in": price_in, "price_out": price_out,
        "budget_tokens": budget_tokens, "requests_per_minute": requests_per_minute, "timeout_seconds": timeout,
        "request": _mapping(request),
    }  # fmt: skip
    run_eval(
        console,
        run=run,
        model=model,
        endpoint=settings if endpoint else None,
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
    from skillsd.files.read import YamlError, parse_yaml

    try:
        value = parse_yaml(text or "{}")
    except YamlError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"--request is {text!r}: expected keys and values, e.g. '{{reasoning_effort: low}}'")
    return value
