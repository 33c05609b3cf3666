"""Read files that may be truncated or damaged: each gives its content, or one `DamagedError` that says where."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from skillsd.errors import UserError


class DamagedError(UserError):
    """A file can't be read, or holds something else than expected.

    Args:
        path: the file.
        fault: what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, path: Path, fault: str, remedy: str) -> None:
        self.path, self.fault = path, fault
        super().__init__(f"{str(path)!r} {fault}: {remedy}")


def read_text(path: Path, remedy: str) -> str:
    """A text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(path, f"is damaged (byte {error.start} is not UTF-8)", remedy) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise DamagedError(path, f"can't be read ({getattr(error, 'strerror', None) or error})", remedy) from error


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file."""
    return _json(read_text(path, remedy), path, "", remedy)


def read_json_object(path: Path, remedy: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object of a JSON file, with at least these keys."""
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise DamagedError(path, f"is damaged (it holds a {type(found).__name__}, expected an object)", remedy)
    if missing := [key for key in keys if key not in found]:
        raise DamagedError(path, f"is damaged (it has no {', '.join(map(repr, missing))})", remedy)
    return found


def read_lines(path: Path, remedy: str) -> Iterator[tuple[int, Any]]:
    """(number, content) of the lines of a .jsonl file; none if it does not exist.

    An incomplete last line, which a crash leaves, is left out. Any other damaged line is an error.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamagedError(path, f"can't be read ({error.strerror})", remedy) from error
    *lines, last = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _json(_decoded(line, number, path, remedy), path, f"line {number}: ", remedy)
    with suppress(ValueError):  # incomplete
        if last.strip():
            yield len(lines) + 1, json.loads(last)


def read_compressed_lines(path: Path, remedy: str) -> Iterator[tuple[int, Any]]:
    """(number, content) of the lines of a .jsonl.gz file, which is written whole: any fault is an error."""
    try:
        packed = path.read_bytes()
        content = gzip.decompress(packed or b"\0")  # without any bytes there would be no error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedError(path, f"is damaged ({error})", remedy) from error
    except OSError as error:
        raise DamagedError(path, f"can't be read ({error.strerror})", remedy) from error
    for number, line in enumerate(content.splitlines(), 1):
        yield number, _json(_decoded(line, number, path, remedy), path, f"line {number}: ", remedy)


def _decoded(line: bytes, number: int, path: Path, remedy: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(path, f"is damaged (line {number} is not UTF-8)", remedy) from error


def read_records(path: Path, numbers: Sequence[str] = (), remedy: str | None = None) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with at least these keys, whose values are numbers."""
    remedy = remedy or "remove the damaged line, or restore the file"
    records = []
    for number, record in read_lines(path, remedy):
        if not isinstance(record, dict):
            raise DamagedError(path, f"is damaged (line {number} is no object)", remedy)
        for key in numbers:
            value = record.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise DamagedError(path, f"is damaged (line {number} has no number {key!r})", remedy)
        records.append(record)
    return records


def _json(text: str, path: Path, where: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"character {error.pos + 1}" if where else f"line {error.lineno}, column {error.colno}"
        raise DamagedError(path, f"is damaged ({where}{error.msg} at {place})", remedy) from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"is damaged ({where}{error})", remedy) from error


# -- YAML -----------------------------------------------------------------------------------------------------------


class YamlError(ValueError):
    """A text that is not readable as YAML; the message says where, on one line."""


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file.

    Args:
        what: the file, for error messages: "the recipe".

    Raises:
        UserError: if it can't be read, or gives a key twice.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {str(path)!r} is not readable YAML: {' '.join(str(error).split())}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {str(path)!r} can't be read: {reason}") from error


def parse_yaml(text: str) -> Any:
    """A text as YAML.

    Raises:
        YamlError: if it is not readable, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except YamlError:
        raise
    except Exception as error:  # PyYAML lets KeyError, ValueError, AttributeError, RecursionError ... through
        raise YamlError(" ".join(str(error).split()) or type(error).__name__) from error


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML's loader drops the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            try:
                first = lines.get(key)
            except TypeError:  # unhashable: reported below
                continue
            if first is not None:
                raise YamlError(f"the key {key!r} is given twice, in line {first} and in line {line}")
            lines[key] = line
        return super().construct_mapping(node, deep=deep)
