"""Tables of docs/performance.md."""

from __future__ import annotations

import importlib
import sys

from blocks.common import ROOT, benchmark, table


def vs_trl() -> str:
    """The tables that `benchmarks/vs_trl.py` prints."""
    folder = str(ROOT / "benchmarks" / "contestants")
    sys.path.insert(0, folder)
    try:
        comparison = importlib.import_module("comparison")
    finally:
        sys.path.remove(folder)
    rendered: str = comparison.markdown(benchmark("vs_trl"))
    return rendered


def growth() -> str:
    found = benchmark("vs_trl")["by_turns"]["growth"]
    turns = list(next(iter(found.values())))
    rows = [[name, *(f"{seconds[count]:.1f} s" for count in turns)] for name, seconds in found.items()]
    return table(["turns", *turns], rows)


RENDERERS = {"vs-trl": vs_trl, "vs-trl-growth": growth}
