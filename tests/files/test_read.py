"""Damaged files give one error that names the file, what is wrong and what to do."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillsd.errors import UserError
from skillsd.files.read import (
    DamagedError,
    YamlError,
    parse_yaml,
    read_json_object,
    read_records,
    read_yaml,
)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "line 1, column 1"),
        (b'{"a": 1', "line 1, column 8"),
        (b"[1]", "it holds a list, expected an object"),
        (b'{"b": 1}', "it has no 'a'"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "is damaged"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is damaged"),
    ],
)
def test_damaged_json(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError) as error:
        read_json_object(path, "remove it", ["a"])
    assert str(path) in str(error.value)
    assert fault in str(error.value)
    assert str(error.value).endswith(": remove it")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(DamagedError, match="can't be read"):
            read_json_object(path, "remove it")
    assert read_records(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"i": 1}\n{"i": \n{"i": 3}\n', "line 2: "),
        (b'{"i": 1}\n[]\n', "line 2 is no object"),
        (b'{"i": true}\n', "line 1 has no number 'i'"),
        (b'{"i": 1}\n\xff\n', "line 2 is not UTF-8"),
        (b'{"i": 1}\n\0\0\0\0\n', "line 2: "),
    ],
)
def test_damaged_lines(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="remove the damaged line") as error:
        read_records(path, ["i"])
    assert fault in str(error.value)


@pytest.mark.parametrize("end", [b"", b'{"i": 2', b"\xff", b'{"i"', b"\0\0\0"])
def test_an_incomplete_last_line_is_left_out(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"i": 1}\n' + end)
    assert read_records(tmp_path / "a.jsonl", ["i"]) == [{"i": 1}]


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(content)
        for read in (lambda: read_json_object(path, "r"), lambda: read_records(path), lambda: read_yaml(path, "it")):
            with suppress(UserError):
                read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice, in line 1 and in line 3"),
        ("x:\n  a: 1\n  a: 1\n", "the key 'a' is given twice, in line 2 and in line 3"),
        ("- {a: 1, a: 2}\n", "the key 'a' is given twice, in line 1 and in line 1"),
        ("on: 1\nyes: 2\n", "the key True is given twice"),
    ],
)
def test_a_key_twice_is_refused_with_its_lines(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        parse_yaml(text)


def test_merged_keys_are_not_given_twice() -> None:
    assert parse_yaml("a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n")["b"] == {"x": 2}


@pytest.mark.parametrize(
    "text",
    ["{" * 3000, "? [a]\n: 1", "!!python/object:os.system {}", "2024-13-45", "&a [*a", "\x00", "!!int x", "[[a]: 1"],
)
def test_unreadable_yaml_is_one_error(text: str) -> None:
    with pytest.raises(YamlError) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value) or "line" in str(error.value)


@given(st.text(st.sampled_from("ab:-{}[]&*!?|>'\"\n #%@`,<1.e"), max_size=30))
def test_any_text_is_yaml_or_one_error(text: str) -> None:
    with suppress(YamlError):
        parse_yaml(text)
