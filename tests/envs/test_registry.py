"""Environments are found by entry point and by ``module:Class``; what is wrong is told with the nearest right name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from skillsd.envs import registry
from skillsd.errors import UserError

EXAMPLE = (Path(__file__).parents[2] / "examples" / "custom_env.py").read_text()


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of somebody else's, installed: its module, and the entry point in its metadata."""
    (tmp_path / "their_env.py").write_text(EXAMPLE)
    info = tmp_path / "their_env-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-env\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[skillsd.environments]\nguess = their_env:GuessNumber\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_env", raising=False)
    return tmp_path


def test_a_third_party_registers_by_entry_point(third_party: Path) -> None:
    assert {"guess", "sokoban"} <= set(registry.names())
    assert registry.load("guess").name == "guess-number"


def test_a_class_in_the_folder_where_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_env.py").write_text(EXAMPLE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as under an installed command
    monkeypatch.chdir(tmp_path)
    assert registry.load("my_own_env:GuessNumber").max_turns == 10


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("sokobann", {}, "Did you mean 'sokoban'"),
        ("sokoban", {"presett": "nano"}, "Did you mean 'preset'"),
        ("sokoban", {"preset": "nanoo"}, "Did you mean 'nano'"),
        ("no_such_module:Thing", {}, "can't be imported"),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load(name, options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
