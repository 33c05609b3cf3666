"""One HTML file from a report: style, scripts and data inside of it, and a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from skillsd.page.data import Report

STATIC = Path(__file__).parent / "static"

VENDOR = ("vendor/vega.min.js", "vendor/vega-lite.min.js", "vendor/vega-interpreter.js")
SCRIPTS = (
    "elements.js", "data.js", "charts.js", "overview.js", "curves.js", "picture.js", "tokens.js", "groups.js",
    "episode.js", "skills.js", "search.js", "app.js",
)  # fmt: skip
"""The page's own scripts, in the order of their use; together they are one strict function."""


def page(report: Report) -> str:
    """The whole file.

    Its content-security policy allows the scripts and the style that are in it, by their hashes, and no request to
    anywhere. It also forbids to make HTML from text in scripts, so that a model's or an environment's words can only
    become text nodes.
    """
    scripts = [(STATIC / name).read_text(encoding="utf-8") for name in VENDOR]
    own = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    scripts.append(f'(() => {{\n"use strict";\n{own}\n}})();\n')
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    parts = {
        "policy": policy,
        "title": html.escape(f"{report.light['title']} · skillsd"),
        "style": style,
        "data": _data("light", _json(report.light), "application/json"),
        "chunks": "\n".join(_data(f"chunk-{name}", text, "text/plain") for name, text in report.chunks.items()),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    before, *pieces = (STATIC / "page.html").read_text(encoding="utf-8").split("{{")
    filled = [before]
    for piece in pieces:  # not str.replace: what has been filled in may contain anything
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that can't end its element: without ``<``."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace").decode().replace("<", "\\u003c")


def _data(name: str, text: str, kind: str) -> str:
    return f'<script type="{kind}" id="{html.escape(name)}">{text}</script>'
