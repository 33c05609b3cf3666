"""Options of an environment's demonstrations (``warm_start.demonstrations``), with one wording of their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from skillsd.errors import UserError, unknown_name

T = TypeVar("T")


def chosen(kind: type[T], given: Mapping[str, Any]) -> T:
    """An instance of the dataclass `kind` with the given options.

    Raises:
        UserError: for an unknown option, or an invalid value (by the class's ``__post_init__``).
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise unknown_name("demonstrations option", name, known)
    return kind(**given)


def check_share(name: str, value: object) -> None:
    """Check that an option is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"demonstrations: {name} is {value!r}; expected a share from 0 to 1")


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Check that an option is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        expected = "a whole number, at least 1" if most is None else f"a whole number from 1 to {most}"
        raise UserError(f"demonstrations: {name} is {value!r}; expected {expected}")
