"""The study with a real pretrained model, SmolLM2-135M, on two CPU cores. `run.sh` calls it.

    python studies/llm/measure.py evaluations PARTS --base BASE --run RUN   # untouched, warm start, trained
    python studies/llm/measure.py gap PARTS                                 # sampler's against learner's log-probs
    python studies/llm/measure.py server PARTS                              # vLLM's server plays and writes skills
    python studies/llm/measure.py memory PARTS --base BASE                  # all weights against LoRA
    python studies/llm/measure.py collect PARTS --base BASE --run RUN --json docs/results/llm.json

Each measurement is a file in the folder PARTS, `NAME.json`, with its command, commit and load. Existing ones are not
measured again. Everything uses one thread. Run it from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from parts import PLAIN


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("evaluations", "gap", "server", "memory", "collect"):
        command = commands.add_parser(name)
        command.add_argument("parts", type=Path)
        if name in ("evaluations", "memory", "collect"):
            command.add_argument("--base", type=Path, default=Path("models/sokoban-smollm2-base"))
        if name in ("evaluations", "collect"):
            command.add_argument("--run", type=Path, default=Path("runs/sokoban-smollm2"))
        if name == "collect":
            command.add_argument("--json", type=Path, default=Path("docs/results/llm.json"))
        if name in ("gap", "server", "memory"):
            command.add_argument("--model", default=PLAIN)
        if name == "server":
            command.add_argument(
                "--name", default="server", help="name of the part; skills are written for 'server' only"
            )
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["NO_PROXY"] = "127.0.0.1"
    if options.command == "evaluations":
        from evaluations import evaluations

        evaluations(options.parts, options.base, options.run)
    elif options.command == "gap":
        from gap import gap

        gap(options.parts, options.model)
    elif options.command == "server":
        from server import server

        server(options.parts, options.model, options.name, summaries=options.name == "server")
    elif options.command == "memory":
        from memory import memory

        memory(options.parts, options.model, options.base)
    else:
        from collect import collect_all

        found = collect_all(options.parts, options.base, options.run)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        if found["missing"]:
            print(f"missing: {', '.join(found['missing'])}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
