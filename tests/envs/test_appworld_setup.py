"""Setting up AppWorld: completed steps are skipped, interrupted ones repeated, failures reported. No network.

A shell script replaces Python, venv, pip, AppWorld and the world builder; the last section uses the real ones.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from skillsd.cli.doctor import examine
from skillsd.envs import setups
from skillsd.envs.appworld import client, doctor, paths, setup
from skillsd.envs.hosts import HostBrokenError
from skillsd.errors import UserError

REPOSITORY = Path(__file__).parents[2]

FAKE = r"""#!/bin/sh
case "$*" in
    *sys.version_info*) echo "${FAKE_VERSION:-3 12}"; exit ;;
    *"-m venv"*) step=venv ;;
    *"-m pip"*) step=pip ;;
    *"-m appworld.cli"*) step=unpack ;;
    *build.py*) step=build ;;
esac
echo $step >> "$FAKE_CALLS"
case $step in
    venv) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    pip) [ -e "$(dirname "$0")/../half" ] && echo "on top of half packages" && exit 3
         touch "$(dirname "$0")/../half" ;;
    unpack) [ "$APPWORLD_CACHE" ] && touch "$(dirname "$0")/../unpacked" ;;
    build) mkdir -p "$3"; echo "5 of 9 tasks" ;;
esac
if [ "$FAKE_WAITS" = $step ]; then
    echo $$ > "$FAKE_CALLS.pid"
    for turn in $(seq 2000); do [ -e "$FAKE_CALLS.go" ] && break; sleep 0.05; done
fi
if [ "$FAKE_FAILS" = $step ]; then
    printf '%b\n' "$FAKE_OUTPUT" >&2
    [ "$FAKE_SIGNAL" ] && kill -"$FAKE_SIGNAL" $$
    exit 1
fi
[ $step = build ] && mkdir -p "$3/data" && echo "{\"version\": \"$FAKE_WORLD\"}" > "$3/data/skillsd.json"
exit 0
"""


class Fake:
    """The fake Python, with the steps it ran and the lines that set-up printed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.python, self._calls, self._set = folder / "fake-python", folder / "calls", monkeypatch.setenv
        self._unset = monkeypatch.delenv
        self.python.write_text(FAKE, encoding="utf-8")
        self.python.chmod(0o755)
        self.lines: list[str] = []
        self._set("FAKE_CALLS", str(self._calls))
        self.builds("0123456789ab", monkeypatch)

    def builds(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paths, "builder_version", lambda: version)
        self._set("FAKE_WORLD", version)

    def __call__(self) -> None:
        setup.setup(self.lines.append, python=str(self.python))

    def steps(self) -> list[str]:
        """The steps run since the last call."""
        steps = self._calls.read_text(encoding="utf-8").split() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return steps

    def waits(self, step: str) -> None:
        """From now on, a step waits until `go` is called."""
        self._set("FAKE_WAITS", step)

    def waiting(self) -> int:
        """Wait until a step waits. Returns its process id."""
        path = Path(f"{self._calls}.pid")
        wait_for(lambda: path.exists() and path.read_text(encoding="utf-8").endswith("\n"))
        return int(path.read_text(encoding="utf-8"))

    def go(self) -> None:
        Path(f"{self._calls}.go").touch()

    def fails(self, step: str, output: str = "", *, signal: str = "") -> None:
        self._set("FAKE_FAILS", step)
        self._set("FAKE_OUTPUT", output)
        self._set("FAKE_SIGNAL", signal)

    def works(self) -> None:
        self._unset("FAKE_FAILS")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    return Fake(tmp_path, monkeypatch)


ALL = ["venv", "pip", "unpack", "build"]
STEPS = ["virtual environment", f"install appworld=={paths.VERSION}", "unpack AppWorld", "build the task world"]


def official_data(root: Path) -> Path:
    for folder in ("tasks", "datasets", "base_dbs"):
        (root / "data" / folder).mkdir(parents=True)
    (root / "data" / "version.txt").write_text("0.1.0", encoding="utf-8")
    (root / "data" / "datasets" / "train.txt").write_text("", encoding="utf-8")
    return root


# --- skipped and repeated steps ---


def test_each_step_runs_once(fake: Fake) -> None:
    with pytest.raises(UserError, match="run `skillsd envs setup appworld`"):
        paths.python()
    with pytest.raises(UserError, match="run `skillsd envs setup appworld`"):
        paths.world()
    fake()
    assert fake.steps() == ALL
    assert paths.python() == paths.home() / "venv/bin/python"
    assert paths.world() == paths.home() / f"world-{paths.builder_version()}"
    assert "      5 of 9 tasks" in fake.lines
    assert any("done in" in line for line in fake.lines)
    fake.lines.clear()
    fake()
    assert fake.steps() == []
    assert sum("already done" in line for line in fake.lines) == 4


def test_a_new_builder_version_builds_a_new_world(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake()
    first = paths.world()
    fake.builds("ba9876543210", monkeypatch)
    with pytest.raises(UserError, match="one built by other sources is"):
        paths.world()
    fake.steps()
    fake()
    assert fake.steps() == ["build"]
    assert paths.world() != first
    assert first.is_dir()  # a run may be using it


AFTER = {"venv": ALL, "pip": ALL, "unpack": ALL[2:], "build": ALL[3:]}
"""Steps to repeat after a failed step. A failed pip leaves incomplete packages, so the venv is recreated too."""


@pytest.mark.parametrize("step", ALL)
@pytest.mark.parametrize("killed", [False, True], ids=["fails", "killed"])
def test_an_interrupted_step_is_repeated(fake: Fake, step: str, killed: bool) -> None:
    fake.fails(step, "something broke", signal="9" if killed else "")
    with pytest.raises(UserError) as error:
        fake()
    number, name = ALL.index(step) + 1, STEPS[ALL.index(step)]
    ended = "killed by signal 9" if killed else "exit status 1"
    remedy = "It ran out of memory" if killed else "Run the command again"
    first, second = str(error.value).splitlines()
    assert first.startswith(f"AppWorld {paths.VERSION} set-up: step {number}/4 ({name}) failed, {ended}: ")
    assert first.endswith("something broke")
    assert second.startswith(remedy)
    assert "something broke" in Path(second.rpartition(": ")[2]).read_text(encoding="utf-8")
    assert paths.installed() == (step == "build")
    with pytest.raises(UserError):
        paths.world()
    fake.works()
    assert fake.steps() == ALL[:number]
    fake()
    assert fake.steps() == AFTER[step]
    assert paths.world().is_dir()


def test_an_interrupt_stops_the_running_step(fake: Fake) -> None:
    fake.waits("build")

    def stop(line: str) -> None:
        if "5 of 9" in line:
            fake.waiting()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.setup(stop, python=str(fake.python))
    with pytest.raises(ProcessLookupError):
        os.kill(fake.waiting(), 0)
    assert paths.built_by(paths.world_folder()) is None


def test_a_removed_interpreter_is_reinstalled(fake: Fake) -> None:
    fake()
    fake.steps()
    (paths.venv() / "bin/python").unlink()  # as if the Python it links to were uninstalled
    with pytest.raises(UserError, match="is not installed"):
        paths.python()
    fake()
    assert fake.steps() == ALL[:3]


# --- concurrent set-ups ---


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_concurrent_set_ups_run_each_step_once(fake: Fake) -> None:
    fake.waits("pip")
    threads = [threading.Thread(target=fake) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: any("waiting for it" in line for line in fake.lines))
    fake.go()
    for thread in threads:
        thread.join()
    assert fake.steps() == ALL


def test_waits_for_the_orphan_of_a_killed_set_up(fake: Fake) -> None:
    fake.waits("pip")
    code = f"from skillsd.envs.appworld import setup; setup.setup(print, python={str(fake.python)!r})"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    fake.waiting()
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = threading.Thread(target=fake)
    second.start()
    wait_for(lambda: any("waiting for it" in line for line in fake.lines))
    fake.go()
    second.join()
    assert fake.steps() == ["venv", "pip", *ALL]


# --- failures ---

FAULTS = [
    (
        "venv",
        "The virtual environment was not created: ensurepip is not available.",
        "python3-venv",
    ),
    ("venv", "/usr/bin/python3: No module named venv", "python3-venv"),
    ("pip", "WARNING: Retrying\\nERROR: No matching distribution found for appworld==0.1.3.post1", "PIP_INDEX_URL"),
    ("pip", "ERROR: HTTPSConnectionPool(host='pypi.org', port=443): Read timed out.", "check the network"),
    ("pip", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "SKILLSD_CACHE"),
    ("pip", "error: failed\\nERROR: Failed building wheel for uvloop", "another Python with --python"),
    ("unpack", "Traceback ...\\nPermissionError: [Errno 13] Permission denied: '/x'", "you may write to"),
    ("build", "Traceback ...\\nOSError: [Errno 28] No space left on device", "SKILLSD_CACHE"),
    ("build", "Traceback ...\\nMemoryError", "out of memory"),
]


@pytest.mark.parametrize(("step", "output", "remedy"), FAULTS)
def test_a_failure_names_its_step_and_a_remedy(fake: Fake, step: str, output: str, remedy: str) -> None:
    fake.fails(step, output)
    with pytest.raises(UserError) as error:
        fake()
    first, second = str(error.value).splitlines()
    assert f"step {ALL.index(step) + 1}/4" in first
    assert output.split("\\n")[-1] in first
    assert "WARNING" not in first
    assert remedy in second


def test_too_little_disk_space(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=599 << 20))
    with pytest.raises(UserError, match=r"takes 600 MB, but .* has 599 MB free. Set SKILLSD_CACHE"):
        fake()
    assert fake.steps() == []


def test_an_unusable_cache_folder(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't set up AppWorld .* in .* Set SKILLSD_CACHE to a writable folder"):
        fake()


@pytest.mark.parametrize("version", ["3 10", "3 14"])
def test_an_unsupported_python(fake: Fake, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("FAKE_VERSION", version)
    with pytest.raises(
        UserError, match=rf"needs Python 3.11 to 3.13, but .*fake-python is {version.replace(' ', '.')}"
    ):
        fake()


@pytest.mark.parametrize("python", ["/no/python", "no-such-python", "/bin/true"])
def test_a_python_that_does_not_run(fake: Fake, python: str) -> None:
    with pytest.raises(UserError, match=f"--python is {python!r}, which is not a working Python"):
        setup.setup(fake.lines.append, python=python)


def test_a_missing_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.BUILDER.is_file()
    monkeypatch.setitem(sys.modules, "skillsd.envs.appworld.world.build", None)
    with pytest.raises(UserError, match=r"can't import the builder of AppWorld's tasks.*Reinstall skillsd"):
        paths.builder_version()


def test_a_world_of_another_version(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WORLD", "ba9876543210")
    with pytest.raises(UserError, match=r"step 4/4 .* it built version 'ba9876543210', expected '0123456789ab'"):
        fake()


def test_the_set_up_is_registered(fake: Fake) -> None:
    found = setups.find("appworld")
    assert not found.done()
    setups.run("appworld", fake.lines.append, {"data": None, "python": str(fake.python)})
    assert fake.steps() == ALL
    assert found.done()


# --- official data ---


def test_official_data_are_found(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake()
    assert paths.official() is None
    assert f"    {paths.venv()}/bin/appworld download data --root ~/appworld" in fake.lines
    root = official_data(tmp_path / "official")
    monkeypatch.setenv("APPWORLD_ROOT", str(root))
    assert paths.official() == root
    fake()
    assert fake.lines[-1] == f"official data: {root}; in a recipe: environment.options.root={root}"
    monkeypatch.setenv("APPWORLD_ROOT", str(paths.world()))  # our own world doesn't count as official
    assert paths.official() is None


def test_data_are_checked_before_the_first_step(fake: Fake, tmp_path: Path) -> None:
    root = official_data(tmp_path / "official")
    for wrong, why in [
        (tmp_path / "nowhere", "without data/"),
        (root / "data", f"give its parent, {str(root)!r}"),
    ]:
        with pytest.raises(UserError, match=re.escape(why)):
            setup.setup(fake.lines.append, data=wrong, python=str(fake.python))
    (root / "data/datasets/train.txt").unlink()
    (root / "data/base_dbs").rmdir()
    with pytest.raises(UserError, match=r"without data/base_dbs, data/datasets/train.txt"):
        setup.setup(fake.lines.append, data=root, python=str(fake.python))
    assert fake.steps() == []
    official_data(tmp_path / "whole")
    root = tmp_path / "whole"
    setup.setup(fake.lines.append, data=root, python=str(fake.python))
    assert fake.lines[-1].endswith(f"environment.options.root={root}")


# --- `skillsd doctor` ---


def test_the_doctor_reports_what_is_installed(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [line] = doctor.report()
    assert line == (
        "not installed (skillsd envs setup appworld); our own tasks not built; "
        "official data: not found ($APPWORLD_ROOT)"
    )
    fake()
    monkeypatch.setattr(client, "protections", lambda python, root: ["files", "network"])
    monkeypatch.setenv("APPWORLD_ROOT", str(official_data(tmp_path / "official")))
    state, jail, *missing = doctor.report()
    assert state == f"installed; our own tasks built; official data: {tmp_path / 'official'}"
    assert jail == "jail for the model's code: files, network (docs/appworld.md)"
    lacking = ["metadata", "processes", "user", "syscalls", "limits"]
    assert [line.split()[2] for line in missing[:-1]] == lacking
    assert missing[-2] == f"MISSING PROTECTION: limits ({client.PROTECTIONS['limits']})"
    assert missing[-1].endswith(f"refused, except with environment.options.unsafe_without=[{','.join(lacking)}]")

    def broken(python: Path, root: Path) -> list[str]:
        raise HostBrokenError("no jail starts: it rains")

    monkeypatch.setattr(client, "protections", broken)
    assert doctor.report()[1].startswith("jail for the model's code: no protection (no jail starts: it rains)")


def test_the_doctor_command_shows_the_report(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "report", lambda: ["one line", "and another"])
    output = io.StringIO()
    examine(Console(file=output, width=200), None)
    lines = [line.split(maxsplit=1) for line in output.getvalue().splitlines()]
    assert [text for name, text in lines if name == "appworld"] == ["one line", "and another"]


# --- AppWorld's protected files must not be redistributed ---

PROTECTED = re.compile(
    r"\.(db|bundle)$|(^|/)(api_docs|base_dbs|ground_truth)/|(^|/)apps/[^/]+/(apis|models|factories|responses)\.pyi?$"
    r"|(^|/)data/(tasks|datasets)/"
)
CANARY = "appworld:" + "d17ac3f"
"""AppWorld's files contain this string, so that leaked copies can be found."""


def _git(*arguments: str) -> list[str]:
    ended = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if ended.returncode not in (0, 1):  # 1: grep found nothing
        pytest.skip(f"not a git checkout: {ended.stderr.strip()}")
    return ended.stdout.splitlines()


def test_the_pattern_matches_protected_files() -> None:
    root = "lib/python3.11/site-packages/appworld"
    for name in (f"{root}/apps/spotify/apis.py", f"{root}/apps/gmail/models.pyi", "data/tasks/a_1/specs.json",
                 "x/data/base_dbs/spotify.jsonl", "data/api_docs/standard/gmail.json", "a.db", "y/.source/apps.bundle",
                 "w/ground_truth/answer.json"):  # fmt: skip
        assert PROTECTED.search(name), name


def test_the_repository_has_no_protected_files() -> None:
    files = _git("ls-files")
    assert [name for name in files if PROTECTED.search(name)] == []
    assert _git("grep", "-l", CANARY) == []


def test_git_ignores_protected_files() -> None:
    _git("rev-parse")
    for name in ("data/tasks/a/specs.json", "src/skillsd/x.db", "x/api_docs/gmail.json", "x/ground_truth/answer.json"):
        assert _git("check-ignore", name) == [name]


def test_the_package_has_no_protected_files() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    package = REPOSITORY / "src/skillsd"
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for glob in project["tool"]["setuptools"]["package-data"]["skillsd"]
        for path in package.glob(glob)
        if path.is_file()
    }
    assert found
    assert sorted(name for name in found if PROTECTED.search(name)) == []
    if tracked := set(_git("ls-files", "src/skillsd")):
        changed = set(_git("ls-files", "--others", "--exclude-standard", "src/skillsd"))
        assert sorted(found - tracked - changed) == []  # no file that git ignores may get into a wheel


# --- the real programs ---


def test_real_pip_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("FIND_LINKS", "EXTRA_INDEX_URL", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    with pytest.raises(UserError, match=r"step 2/4 \(install appworld==\S+ failed, .*No matching.*\n.*PIP_INDEX_URL"):
        setup.setup(lambda line: None)


def test_a_completed_set_up_runs_no_step() -> None:
    if not paths.installed() or paths.built_by(paths.world_folder()) != paths.builder_version():
        pytest.skip(f"AppWorld is not set up: run `{paths.SETUP}`")
    lines: list[str] = []
    setup.setup(lines.append)
    assert sum("already done" in line for line in lines) == 4
    assert paths.world().name == f"world-{paths.built_by(paths.world())}"
    site = next((paths.venv() / "lib").glob("python*/site-packages"))
    assert (site / "appworld/apps/supervisor/apis.py").is_file()
    assert (site / f"appworld-{paths.VERSION}.dist-info").is_dir()
