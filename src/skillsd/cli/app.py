"""The command line. Every user mistake gets one clear line and no traceback."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

from skillsd.cli import (
    config,
    envs,
    evaluation,
    export_trajectories,
    listing,
    models,
    report,
    show,
    skills,
    tables,
    training,
)
from skillsd.cli.common import SETTING, errors
from skillsd.config import RunConfig, SftConfig
from skillsd.config.keys import keys
from skillsd.errors import EngineFailedError, RanksLostError, UserError

app = typer.Typer(
    help="Skill-SD: skill-conditioned self-distillation for multi-turn LLM agents (arXiv 2604.10674).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"max_content_width": 120},
)
for register in (training, evaluation, report, show, export_trajectories, tables, config, listing):
    register.add_to(app)
app.add_typer(skills.app, name="skills")
app.add_typer(models.app, name="models")
app.add_typer(envs.app, name="envs")

_UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
"""click's class; newer versions of typer vendor their own."""


def main() -> None:
    """The entry point `skillsd`."""
    # Otherwise tokenizers warns about its threads whenever this process starts another one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(prog_name="skillsd", standalone_mode=False) or 0
    except RanksLostError as error:
        _fail(str(error), RanksLostError.EXIT_CODE)
    except (UserError, EngineFailedError) as error:
        _fail(str(error))
    except _UsageError as error:
        if error.__class__.__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command = error.ctx.command_path if error.ctx else "skillsd"
        hint = _setting_hint(error)
        _fail(f"{f'{error.message}. {hint}' if hint else error.format_message()} ({command} --help)")
    except OSError as error:
        what = error.strerror or " ".join(str(error).split()) or type(error).__name__
        _fail(what if error.filename is None else f"{str(error.filename)!r}: {what}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        errors.print("stopped")
    sys.exit(code)


def _setting_hint(error: Any) -> str:
    """For an unknown option that is the name of a recipe key (``--method grpo``): how to write it as a setting."""
    option = str(getattr(error, "option_name", ""))
    takes_settings = error.ctx and any(SETTING in (p.metavar or "") for p in error.ctx.command.params)
    if not takes_settings or not option.startswith("--"):
        return ""
    if any(other.startswith(option) for other in error.possibilities or ()):  # --seed for --seeds
        return ""
    name = option.removeprefix("--").replace("-", "_")
    kind = SftConfig if error.ctx.command.name == "sft" else RunConfig
    paths = [key.path for key in keys(kind) if "[]" not in key.path]
    found = (
        [path for path in paths if path == name]
        or [path for path in paths if path == f"{name}.name"]
        or [path for path in paths if path.split(".")[-1] == name]
    )
    value = _value_of(option)
    return f"Did you mean {' or '.join(f'{path}={value}' for path in found[:3])}?" if found else ""


def _value_of(option: str) -> str:
    """The value that the command line gives to `option`; VALUE if there is none."""
    for word, following in zip(sys.argv, [*sys.argv[1:], "-"], strict=True):
        if word == option and not following.startswith("-"):
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return "VALUE"


def _fail(message: str, code: int = 2) -> NoReturn:
    errors.print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
