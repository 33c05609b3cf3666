"""Render the generated tables of README.md and docs/ from the package and the JSON files of results.

    python docs/render.py            # rewrite the blocks that differ
    python docs/render.py --check    # change nothing; exit status 1 if a block is stale

A generated block is everything between the lines ``<!-- generated: NAME -->`` and ``<!-- end -->``; `blocks` has a
renderer for each name. Text outside the blocks stays as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from blocks import RENDERERS, Renderer

ROOT = Path(__file__).resolve().parents[1]

_BEGIN = re.compile(r"<!-- generated: (\S+) -->")
_END = "<!-- end -->"
_NEARLY = re.compile(r"<!--\s*(generated|end)\b", re.IGNORECASE)


class DocsError(Exception):
    """A marker or a name that is wrong."""


def pages(root: Path) -> list[Path]:
    """README.md and all pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(text: str, page: str, renderers: Mapping[str, Renderer]) -> tuple[str, list[str], list[str]]:
    """Render the blocks of a page.

    Args:
        page: its name, for errors.

    Returns:
        The new text, the names of all its blocks, and those of the stale ones.

    Raises:
        DocsError: for an unknown name, a block without an end, or a misspelt marker.
    """
    lines: list[str] = []
    names: list[str] = []
    stale: list[str] = []
    name, body = None, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        where, marker = f"{page}:{number}", line.strip()
        begin = _BEGIN.fullmatch(marker)
        if begin and name is None:
            name, body = begin[1], ""
            if name not in renderers:
                raise DocsError(f"{where}: no renderer for the block {name!r}. Known: {', '.join(sorted(renderers))}")
            lines.append(line)
        elif marker == _END and name is not None:
            rendered = renderers[name]() + "\n"
            if rendered != body:
                stale.append(name)
            names.append(name)
            lines += [rendered, line]
            name = None
        elif _NEARLY.match(marker):
            wanted = _END if name else "<!-- generated: NAME -->"
            raise DocsError(f"{where}: found {marker!r}, expected {wanted!r}")
        elif name is None:
            lines.append(line)
        else:
            body += line
    if name is not None:
        raise DocsError(f"{page}: the block {name!r} has no {_END!r}")
    return "".join(lines), names, stale


def render_all(root: Path, renderers: Mapping[str, Renderer], *, write: bool) -> list[str]:
    """Render the blocks of all pages, and write the pages that change if `write` is true.

    Returns:
        The stale blocks, each as ``page: name``.

    Raises:
        DocsError: as `render`; or for a renderer without a block. Nothing is written then.
    """
    changed: dict[Path, str] = {}
    used: set[str] = set()
    stale: list[str] = []
    for path in pages(root):
        page = str(path.relative_to(root))
        old = path.read_text(encoding="utf-8")
        new, names, differing = render(old, page, renderers)
        used.update(names)
        stale += [f"{page}: {name}" for name in differing]
        if new != old:
            changed[path] = new
    if unused := sorted(renderers.keys() - used):
        raise DocsError(f"no page has a block for the renderers {', '.join(unused)}")
    if write:
        for path, text in changed.items():
            path.write_text(text, encoding="utf-8")
    return stale


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render the generated tables of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if a block is stale")
    check = parser.parse_args(None if arguments is None else list(arguments)).check
    try:
        stale = render_all(ROOT, RENDERERS, write=not check)
    except DocsError as error:
        print(error, file=sys.stderr)
        return 1
    for block in stale:
        print(f"{'stale' if check else 'rendered'}: {block}")
    if check and stale:
        print("run: python docs/render.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
