"""The HTML file, the Markdown and the command: nothing from elsewhere, nothing half-written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

import made_up_run
import pytest
from made_up_run import make_run

from skillsd.cli.app import main
from skillsd.files.lock import locked
from skillsd.page import html
from skillsd.page.data import build
from skillsd.page.markdown import summary
from skillsd.page.subject import open_subject
from skillsd.page.write import watch, write_report
from skillsd.report.writer import METRICS
from skillsd.runs.build import BANK
from skillsd.runs.folder import LOCK
from skillsd.runs.opened import open_run
from skillsd.skills.bank import Bank
from skillsd.types import Outcome, Skill

HOSTILE = "</script><script>window.hacked = 1</script><!--"


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return html.page(build(open_subject(run_folder)))


def test_the_policy_allows_exactly_what_is_in_the_file(page: str) -> None:
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.partition(" ")[::2] for rule in policy.split("; "))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy
    assert "http" not in policy

    def hashed(texts: list[str]) -> str:
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    assert rules["script-src"] == hashed(re.findall(r"<script>(.*?)</script>", page, re.DOTALL))
    assert rules["style-src"] == hashed(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))


def test_data_can_not_end_its_element(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=1, tasks=1)
    run = open_run(folder)
    [group] = run.groups(1)
    with Bank(folder / BANK) as bank:
        bank.add(group.task, Skill("", HOSTILE, ""), source="x", iteration=1, reward=0.0, outcome=Outcome.FAILED)
    page = html.page(build(open_subject(folder)))
    assert HOSTILE not in page
    assert "window.hacked" in page
    assert page.count("<script") == page.count("</script>") == len(html.VENDOR) + 3  # our script, the data, a chunk


def test_vendored_files_have_their_versions_and_licences() -> None:
    vendor = html.STATIC / "vendor"
    text = (vendor / "README.md").read_text()
    for name in html.VENDOR:
        assert f"`{Path(name).name}`" in text
    for licence in re.findall(r"`(LICENSE[^`]*)`", text):
        assert (vendor / licence).is_file()
    [version] = re.findall(r"vega-lite (\d+\.\d+\.\d+)", text)
    assert f'"{version}"' in (vendor / "vega-lite.min.js").read_text(encoding="utf-8")[:2000]


def test_the_wheel_contains_the_page() -> None:
    root = Path(html.__file__).parents[3]
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["skillsd"]
    packed = {path for glob in globs for path in (root / "src" / "skillsd").glob(glob) if path.is_file()}
    assert {path for path in html.STATIC.rglob("*") if path.is_file()} <= packed


# -- writing --------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_earlier_report(run_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    path, _ = write_report(folder)
    before = path.read_bytes()
    (folder / METRICS).write_text("damaged\n{}\n")
    with pytest.raises(Exception, match="damaged"):
        write_report(folder)
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"]


def test_watch_writes_until_the_run_ends(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=1, tasks=1, wanted=3)
    seen: list[tuple[bool, int | None]] = []
    with locked(folder / LOCK, "it", "wait") as file:
        assert file is not None

        def sleep(seconds: float) -> None:
            assert seconds == 7
            if len(seen) == 2:
                file.close()  # the run ends

        watch(folder, None, every=7, on_written=lambda _, r: seen.append((r.running, r.light["reload"])), sleep=sleep)
    assert seen == [(True, 7), (True, 7), (False, None)]


# -- Markdown -------------------------------------------------------------------------------------------------------


def test_markdown_of_a_run(run_folder: Path) -> None:
    text = summary(build(open_subject(run_folder), episodes=0))
    assert text.startswith("### a-run\n\nFinished: 3 of 3 iterations. 36 episodes in 3 iterations")
    assert "| before | 25.0 % [20.0, 30.0] | 0 |" in text
    assert "| after | 40.0 % [35.0, 45.0] | 36 |" in text
    assert "- The teacher scored" in text


def test_markdown_of_a_table_has_its_figures(table_folder: Path) -> None:
    text = summary(build(open_subject(table_folder), episodes=0))
    assert "| skill-sd | 47.1 % [44.1, 50.1] | +1.9 [-1.0, +5.0] | 47.1 % [44.1, 50.1] | 47.1 % | 2 | 20 s |" in text
    assert "| grpo | 45.1 % [42.1, 48.1] | reference |" in text


def test_markdown_shows_signs_as_they_are(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a|b<i>*", iterations=1, tasks=1)
    assert summary(build(open_subject(folder), episodes=0)).startswith("### a\\|b\\<i\\>\\*\n")


# -- the command ----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["skillsd", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def test_the_command_names_its_file(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    code, text, _ = command(monkeypatch, capsys, "report", str(run_folder), "--out", str(out))
    assert code == 0
    assert re.search(r"r\.html: 36 episodes, \d\.\d MB", text)
    assert out.stat().st_size > 500_000
    code, text, _ = command(monkeypatch, capsys, "report", str(run_folder), "--md")
    assert code == 0
    assert text.startswith("### a-run")
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "'nowhere' does not exist: expected the folder of a run, or of a table"),
        (["RUN", "--out", "no/such/r.html"], "there is no folder 'no/such'"),
        (["RUN", "--episodes", "0"], "--episodes"),
    ],
)
def test_bad_input_is_one_line(
    run_folder: Path,
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(run_folder) if word == "RUN" else word for word in words]
    code, _, error = command(monkeypatch, capsys, "report", *given)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_generated_runs_are_made_by_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that docs/report.md names for its measurements."""
    words = [str(tmp_path / "run"), "--iterations", "1", "--tasks", "1", "--group-size", "2"]
    monkeypatch.setattr("sys.argv", ["made_up_run.py", *words])
    made_up_run.main()
    assert json.loads((tmp_path / "run" / METRICS).read_text())["episodes"] == 2
