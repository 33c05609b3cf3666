"""``python -m skillsd.engines.conformance ENGINE MODEL``: check an engine on a model folder (a tiny one: it trains)."""

from __future__ import annotations

import sys

from transformers.utils import logging as hf_logging

from skillsd.engines import conformance, registry
from skillsd.engines.torch.models import resolve
from skillsd.errors import UserError

USAGE = """usage: python -m skillsd.engines.conformance ENGINE MODEL
  ENGINE  a registered engine, or module:Class
  MODEL   a model's name or folder"""


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    engine, model = arguments
    try:
        hf_logging.disable_progress_bar()
        subject = conformance.subject_of(registry.options({"name": engine}), resolve(model))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = 0
    for check in conformance.CHECKS:
        [result] = conformance.examine(subject, [check])
        broken += result.outcome == "broken"
        print(result, flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
