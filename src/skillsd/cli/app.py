"""The command line: every user mistake gets one clear line and no traceback."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

from skillsd.cli import config, envs, evaluation, listing, models, skills, tables, training
from skillsd.cli.common import errors
from skillsd.errors import EngineFailedError, UserError

app = typer.Typer(
    help="Skill-SD: skill-conditioned self-distillation for multi-turn LLM agents (arXiv 2604.10674).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for register in (training, evaluation, tables, config, listing):
    register.add_to(app)
app.add_typer(skills.app, name="skills")
app.add_typer(models.app, name="models")
app.add_typer(envs.app, name="envs")

_UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
"""click's; newer versions of typer have their own."""


def main() -> None:
    """The entry point `skillsd`."""
    # Tokenizers would warn about their own threads whenever this process starts another one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(prog_name="skillsd", standalone_mode=False) or 0
    except (UserError, EngineFailedError) as error:
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
    if code == 130:
        errors.print("stopped")
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    errors.print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
