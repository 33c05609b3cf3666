"""Variants of a recipe for a sweep: labels with settings, from a YAML file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from skillsd import config as configs
from skillsd.errors import UserError, unknown_name
from skillsd.files.read import read_yaml
from skillsd.methods import METHODS

BASE = "base"
"""Label of the untrained model, a row of every table."""

VARIANTS = configs.RECIPES / "variants"

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

OWN = {
    "seed": "give the seeds with --seeds",
    "model.name": "give the base models with --models",
    "training.iterations": "give the length with --episodes",
}
"""Keys that the sweep sets itself, and what to use instead."""


def load_variants(name: str) -> dict[str, list[tuple[str, Any]]]:
    """Label -> its settings as (dotted key, value).

    Args:
        name: a YAML file, or the name of a shipped one (``recipes/variants``).

    Raises:
        UserError: if there is no such file, or it does not map labels to settings.
    """
    path = VARIANTS / f"{name}.yaml"
    if not path.is_file():
        path = Path(name).expanduser()
        if not path.is_file():
            known = sorted(file.stem for file in VARIANTS.glob("*.yaml"))
            if "/" in name or path.suffix:
                raise UserError(f"there is no variants file {name!r}. Shipped: {', '.join(known) or '(none)'}")
            raise unknown_name("variants file", name, known)
    data = read_yaml(path, "the variants file")
    if not isinstance(data, dict) or not data:
        content = f"contains a {type(data).__name__}" if data else "is empty"
        raise UserError(f"the variants file {str(path)!r} {content}, expected labels with settings")
    found = {}
    for label, settings in data.items():
        if not isinstance(label, str) or not LABEL.fullmatch(label):
            raise UserError(f"the variant {label!r} of {str(path)!r} is not usable as a folder name")
        if label in METHODS or label == BASE:
            raise UserError(f"the variant {label!r} of {str(path)!r} has the name of a method: rename it")
        if not isinstance(settings, dict):
            raise UserError(f"the variant {label!r} of {str(path)!r} is {settings!r}, expected settings")
        found[label] = list(_flat(settings, f"the variant {label!r} of {str(path)!r}"))
        for key, _ in found[label]:
            if key in OWN:
                raise UserError(f"the variant {label!r} of {str(path)!r} sets {key}: {OWN[key]}")
    return found


def assignment(key: str, value: Any) -> str:
    """``key=value`` for the command line, the value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def _flat(settings: Mapping[Any, Any], where: str, prefix: str = "") -> Any:
    for key, value in settings.items():
        if not isinstance(key, str) or not key:
            raise UserError(f"{where}: {key!r} is not a key")
        if isinstance(value, dict) and value:
            yield from _flat(value, where, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
