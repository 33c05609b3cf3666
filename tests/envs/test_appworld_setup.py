"""Setting AppWorld up: each step once, again if interrupted, and in words when it fails. No network, no engine.

A shell script plays the Python, venv, pip, AppWorld and the world's builder; the last part asks the real ones.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from skillsd import doctor
from skillsd.envs import registry
from skillsd.envs.appworld import paths, setup
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
if [ "$FAKE_SLOW" = $step ]; then sleep 1; fi
if [ "$FAKE_FAILS" = $step ]; then
    printf '%b\n' "$FAKE_WORDS" >&2
    [ "$FAKE_SIGNAL" ] && kill -"$FAKE_SIGNAL" $$
    exit 1
fi
[ $step = build ] && mkdir -p "$3/data" && echo "{\"version\": \"$FAKE_WORLD\"}" > "$3/data/skillsd.json"
exit 0
"""


class Fake:
    """The played Python, what was asked of it, and what was said."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.python, self._calls, self._set = folder / "fake-python", folder / "calls", monkeypatch.setenv
        self._unset = monkeypatch.delenv
        self.python.write_text(FAKE, encoding="utf-8")
        self.python.chmod(0o755)
        self.said: list[str] = []
        self._set("FAKE_CALLS", str(self._calls))
        self.builds("0123456789ab", monkeypatch)

    def builds(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paths, "builder_version", lambda: version)
        self._set("FAKE_WORLD", version)

    def __call__(self) -> None:
        setup.setup(self.said.append, python=str(self.python))

    def steps(self) -> list[str]:
        """The steps run since the last call of this."""
        steps = self._calls.read_text(encoding="utf-8").split() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return steps

    def fails(self, step: str, words: str = "", *, signal: str = "") -> None:
        self._set("FAKE_FAILS", step)
        self._set("FAKE_WORDS", words)
        self._set("FAKE_SIGNAL", signal)

    def works(self) -> None:
        self._unset("FAKE_FAILS")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    return Fake(tmp_path, monkeypatch)


ALL = ["venv", "pip", "unpack", "build"]


def official_data(root: Path) -> Path:
    for folder in ("tasks", "datasets", "base_dbs"):
        (root / "data" / folder).mkdir(parents=True)
    (root / "data" / "version.txt").write_text("0.1.0", encoding="utf-8")
    (root / "data" / "datasets" / "train.txt").write_text("", encoding="utf-8")
    return root


# -- once, and again -------------------------------------------------------------------------------------------------


def test_each_step_once(fake: Fake) -> None:
    with pytest.raises(UserError, match="run `skillsd envs setup appworld`"):
        paths.python()
    with pytest.raises(UserError, match="run `skillsd envs setup appworld`"):
        paths.world()
    fake()
    assert fake.steps() == ALL
    assert paths.python() == paths.home() / "venv/bin/python"
    assert paths.world() == paths.home() / f"world-{paths.builder_version()}"
    assert "      5 of 9 tasks" in fake.said
    assert any("done in" in line for line in fake.said)
    fake.said.clear()
    fake()
    assert fake.steps() == []
    assert sum("there already" in line for line in fake.said) == 4


def test_another_builder_makes_another_world(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake()
    first = paths.world()
    fake.builds("ba9876543210", monkeypatch)
    with pytest.raises(UserError, match="one of other sources is"):
        paths.world()
    fake.steps()
    fake()
    assert fake.steps() == ["build"]
    assert paths.world() != first
    assert first.is_dir()  # a run may be playing there


AFTER = {"venv": ALL, "pip": ALL, "unpack": ALL[2:], "build": ALL[3:]}
"""A failed pip leaves half packages: everything from the venv on is done again."""


@pytest.mark.parametrize("step", ALL)
@pytest.mark.parametrize("killed", [False, True], ids=["fails", "killed"])
def test_an_interrupted_step_is_done_again(fake: Fake, step: str, killed: bool) -> None:
    fake.fails(step, "something broke", signal="9" if killed else "")
    with pytest.raises(UserError) as error:
        fake()
    number, name = ALL.index(step) + 1, setup._STEPS[ALL.index(step)]
    ended = "killed by signal 9" if killed else "exit status 1"
    remedy = "It ran out of memory" if killed else "Run the command again"
    first, second = str(error.value).splitlines()
    assert first.startswith(f"setting AppWorld up: step {number}/4 ({name}) failed, {ended}: ")
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


def test_stopping_it_stops_what_it_runs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", "build")

    def stop(line: str) -> None:
        if "5 of 9" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.setup(stop, python=str(fake.python))
    time.sleep(1.2)
    assert paths.built_by(paths.world_folder()) is None


def test_an_interpreter_that_went_away(fake: Fake) -> None:
    fake()
    fake.steps()
    (paths.venv() / "bin/python").unlink()  # as when the Python it was a link to is uninstalled
    with pytest.raises(UserError, match="is not installed"):
        paths.python()
    fake()
    assert fake.steps() == ALL[:3]


# -- two at once -----------------------------------------------------------------------------------------------------


def test_two_at_once_do_it_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", "pip")
    threads = [threading.Thread(target=fake) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.steps() == ALL
    assert any("waiting for it" in line for line in fake.said)


def test_what_a_killed_one_left_running_is_waited_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", "pip")
    code = f"from skillsd.envs.appworld import setup; setup.setup(print, python={str(fake.python)!r})"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (paths.venv() / "half").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    fake()
    assert any("waiting for it" in line for line in fake.said)
    assert fake.steps() == ["venv", "pip", *ALL]


# -- faults ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("step", "words", "remedy"), FAULTS)
def test_a_fault_names_its_step_and_its_remedy(fake: Fake, step: str, words: str, remedy: str) -> None:
    fake.fails(step, words)
    with pytest.raises(UserError) as error:
        fake()
    first, second = str(error.value).splitlines()
    assert f"step {ALL.index(step) + 1}/4" in first
    assert words.split("\\n")[-1] in first
    assert "WARNING" not in first
    assert remedy in second


def test_no_room(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOM", 1 << 60)
    with pytest.raises(UserError, match=r"MB free. Set SKILLSD_CACHE to a folder with more"):
        fake()
    assert fake.steps() == []


def test_a_cache_folder_that_cant_be(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't set AppWorld up in .* Set SKILLSD_CACHE to a folder"):
        fake()


@pytest.mark.parametrize("version", ["3 10", "3 14"])
def test_a_python_that_does_not_fit(fake: Fake, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("FAKE_VERSION", version)
    with pytest.raises(
        UserError, match=rf"needs Python 3.11 to 3.13, and .*fake-python is {version.replace(' ', '.')}"
    ):
        fake()


@pytest.mark.parametrize("python", ["/no/python", "no-such-python", "/bin/true"])
def test_no_python_at_all(fake: Fake, python: str) -> None:
    with pytest.raises(UserError, match=f"--python is {python!r}, which is no Python that runs"):
        setup.setup(fake.said.append, python=python)


def test_no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths.BUILDER.is_file()
    monkeypatch.setitem(sys.modules, "skillsd.envs.appworld.world.build", None)
    with pytest.raises(UserError, match=r"builder of AppWorld's tasks does not load.*Install skillsd again"):
        paths.builder_version()


def test_a_builder_of_another_version(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WORLD", "ba9876543210")
    with pytest.raises(UserError, match=r"step 4/4 .* is of version 'ba9876543210', expected '0123456789ab'"):
        fake()


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert registry.setup_of("appworld") is setup.setup
    with pytest.raises(UserError, match="'sokoban' needs no set-up"):
        registry.setup_of("sokoban")
    with pytest.raises(UserError, match="Did you mean 'appworld'"):
        registry.setup_of("appwrld")


# -- official data ---------------------------------------------------------------------------------------------------


def test_official_data_are_found(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake()
    assert paths.official() is None
    assert f"    {paths.venv()}/bin/appworld download data --root ~/appworld" in fake.said
    root = official_data(tmp_path / "official")
    monkeypatch.setenv("APPWORLD_ROOT", str(root))
    assert paths.official() == root
    fake()
    assert fake.said[-1] == f"official data: {root}; in a recipe: environment.options.root={root}"
    monkeypatch.setenv("APPWORLD_ROOT", str(paths.world()))  # ours is not taken for theirs
    assert paths.official() is None
    assert "our own tasks built; official data: not found" in doctor._appworld()[0]


def test_data_is_checked_before_anything_is_done(fake: Fake, tmp_path: Path) -> None:
    root = official_data(tmp_path / "official")
    for wrong, why in [
        (tmp_path / "nowhere", "without data/"),
        (root / "data", f"give the one above it, {str(root)!r}"),
    ]:
        with pytest.raises(UserError, match=re.escape(why)):
            setup.setup(fake.said.append, data=wrong, python=str(fake.python))
    (root / "data/datasets/train.txt").unlink()
    (root / "data/base_dbs").rmdir()
    with pytest.raises(UserError, match=r"without data/base_dbs, data/datasets/train.txt"):
        setup.setup(fake.said.append, data=root, python=str(fake.python))
    assert fake.steps() == []
    official_data(tmp_path / "whole")
    root = tmp_path / "whole"
    setup.setup(fake.said.append, data=root, python=str(fake.python))
    assert fake.said[-1].endswith(f"environment.options.root={root}")


# -- nothing of AppWorld's protected part may be passed on -----------------------------------------------------------

PROTECTED = re.compile(
    r"\.(db|bundle)$|(^|/)(api_docs|base_dbs|ground_truth)/|(^|/)apps/[^/]+/(apis|models|factories|responses)\.pyi?$"
    r"|(^|/)data/(tasks|datasets)/"
)
CANARY = "appworld:" + "d17ac3f"
"""How AppWorld marks its files, so that they can be found where they must not be."""


def _git(*words: str) -> list[str]:
    ended = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    if ended.returncode not in (0, 1):  # 1: grep found nothing
        pytest.skip(f"not a git checkout: {ended.stderr.strip()}")
    return ended.stdout.splitlines()


def test_the_pattern_knows_what_is_protected() -> None:
    root = "lib/python3.11/site-packages/appworld"
    for name in (f"{root}/apps/spotify/apis.py", f"{root}/apps/gmail/models.pyi", "data/tasks/a_1/specs.json",
                 "x/data/base_dbs/spotify.jsonl", "data/api_docs/standard/gmail.json", "a.db", "y/.source/apps.bundle",
                 "w/ground_truth/answer.json"):  # fmt: skip
        assert PROTECTED.search(name), name


def test_the_repository_holds_nothing_protected() -> None:
    files = _git("ls-files")
    assert [name for name in files if PROTECTED.search(name)] == []
    assert _git("grep", "-l", CANARY) == []


def test_git_ignores_what_is_protected() -> None:
    _git("rev-parse")
    for name in ("data/tasks/a/specs.json", "src/skillsd/x.db", "x/api_docs/gmail.json", "x/ground_truth/answer.json"):
        assert _git("check-ignore", name) == [name]


def test_the_package_holds_nothing_protected() -> None:
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
        assert sorted(found - tracked - changed) == []  # nothing that git ignores gets into a wheel


# -- the real ones ---------------------------------------------------------------------------------------------------


def test_real_pip_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path))
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("FIND_LINKS", "EXTRA_INDEX_URL", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    with pytest.raises(UserError, match=r"step 2/4 \(install appworld==\S+ failed, .*No matching.*\n.*PIP_INDEX_URL"):
        setup.setup(lambda line: None)


def test_really_set_up_it_is_quick() -> None:
    if not paths.installed() or paths.built_by(paths.world_folder()) != paths.builder_version():
        pytest.skip(f"AppWorld is not set up; to do it: {paths.SETUP}")
    said: list[str] = []
    start = time.monotonic()
    setup.setup(said.append)
    assert time.monotonic() - start < 5
    assert sum("there already" in line for line in said) == 4
    assert paths.world().name == f"world-{paths.built_by(paths.world())}"
    site = next((paths.venv() / "lib").glob("python*/site-packages"))
    assert (site / "appworld/apps/supervisor/apis.py").is_file()
    assert (site / f"appworld-{paths.VERSION}.dist-info").is_dir()
