"""Finding environments by entry point and by ``module:Class``, and their hook for `skillsd doctor`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import skillsd.cli.doctor
from skillsd import plugins
from skillsd.envs import TaskSet, registry
from skillsd.envs.sokoban import Sokoban
from skillsd.errors import UserError
from skillsd.types import Task

EXAMPLE = (Path(__file__).parents[2] / "examples" / "custom_env.py").read_text()


class Distribution:
    """An installed third-party package with one environment, called ``guess``."""

    def __init__(self, folder: Path) -> None:
        self._package = folder / "their_env"
        self._package.mkdir()
        self.write("__init__", EXAMPLE)
        info = folder / "their_env-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-env\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[skillsd.environments]\nguess = their_env:GuessNumber\n")

    def write(self, module: str, source: str) -> None:
        (self._package / f"{module}.py").write_text(source)


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Distribution(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "their_env"]:
        del sys.modules[module]


def test_shipped_environments_need_no_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source tree works without being installed."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    assert registry.names() == ["appworld", "openenv", "rulebook", "scienceworld", "sokoban", "textworld-express"]
    assert isinstance(registry.load("sokoban").inner, Sokoban)


def test_a_third_party_registers_by_entry_point(third_party: Distribution) -> None:
    assert "guess" in registry.names()
    assert registry.load("guess").name == "guess-number"


def test_a_class_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_env.py").write_text(EXAMPLE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as in an installed command
    monkeypatch.chdir(tmp_path)
    assert registry.load("my_own_env:GuessNumber").max_turns == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sokobann", {}, "Did you mean 'sokoban'"),
        ("sokoban", {"presett": "nano"}, "Did you mean 'preset'"),
        ("sokoban", {"preset": "nanoo"}, "Did you mean 'nano'"),
        ("no_such_module:Thing", {}, "can't be imported"),
        ("os:sep", {}, "environment.name is 'os:sep', a str: expected a subclass of skillsd.envs.TaskSet"),
        ("collections:Counter", {}, "the class Counter: expected a subclass of skillsd.envs.TaskSet"),
        ("builtins:dict", {}, "the class dict"),
        ("skillsd.envs:Environment", {}, "the class Environment"),
        ("os:getcwd", {}, ", a str: expected a subclass"),
        ("builtins:len", {}, "'builtins:len' can't be constructed with environment.options {}"),
    ],
)
def test_mistakes_are_reported_in_one_line(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load(name, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Half(Sokoban):
    """Its `tasks` raises something else for an unknown split."""

    def tasks(self, split: str) -> Sequence[Task]:
        return {name: super(Half, self).tasks(name) for name in self.splits}[split]


@pytest.mark.parametrize("task_set", [Sokoban(), Half()])
def test_an_unknown_split_is_reported_with_its_key(task_set: TaskSet) -> None:
    with pytest.raises(UserError, match=r"evaluation\.split is 'tunes': .*Held-out splits of 'sokoban': tune, test$"):
        registry.tasks_of(task_set, "tunes", "evaluation.split")
    assert registry.tasks_of(task_set, "tune", "evaluation.split") == task_set.tasks("tune")


# --- `skillsd doctor` ---


def test_environments_report_to_the_doctor(third_party: Distribution) -> None:
    assert set(registry.doctor_reports()) == {"appworld"}  # Sokoban and `guess` have no report
    third_party.write("doctor", "def report(): return ['one', 'two']")
    reports = registry.doctor_reports()
    assert list(reports) == ["appworld", "guess"]
    assert reports["guess"] == ["one", "two"]


@pytest.mark.parametrize("fault", ["import no_such_module", "def report(): raise RuntimeError('no luck')"])
def test_a_failing_report_does_not_hide_the_others(third_party: Distribution, fault: str) -> None:
    third_party.write("doctor", fault)
    reports = registry.doctor_reports()
    [line] = reports["guess"]
    assert line.startswith("the report failed: ")
    assert "no_such_module" in line or "no luck" in line
    assert reports["appworld"]


def test_the_doctor_command_names_no_environment() -> None:
    """Environments report to it through the registry, so a new one needs no change there."""
    source = Path(skillsd.cli.doctor.__file__).read_text()
    for name in registry.names():
        assert not re.search(name, source, re.IGNORECASE), name
