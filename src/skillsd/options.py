"""The base of every configuration section: frozen, typed, and strict about unknown keys."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from skillsd.errors import unknown_name


class Options(BaseModel):
    """A section of a recipe. Field docstrings are the documentation shown by `skillsd config`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _must_be_json(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                f"{name!r} can't be written as JSON. YAML has more types than JSON: a date, for example, needs quotes"
            ) from None
    return values


JsonObject = Annotated[dict[str, Any], AfterValidator(_must_be_json)]
"""A mapping whose values can be written as JSON. YAML has more types, such as dates."""


_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class NameOrPath:
    """Annotation for a text field that is one of `names`, or a custom ``module:attribute``."""

    kind: str
    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(self.names)}, {"type": "string", "pattern": f"^{_PATH.pattern}$"}]}

    def _check(self, given: str) -> str:
        if given not in self.names and not _PATH.fullmatch(given):
            raise ValueError(f"{unknown_name(self.kind, given, self.names)}; or module:Class for your own")
        return given
