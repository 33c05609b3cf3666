"""The page in a real browser: headless Chromium, driven by Playwright. Skipped, visibly, where one is missing."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_run import WORDS, make_run

from skillsd.files.lock import locked
from skillsd.page.write import write_report
from skillsd.report.writer import TRAJECTORIES
from skillsd.runs.folder import LOCK
from skillsd.runs.opened import open_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")

VIEWS = ("overview", "curves", "groups", "episode", "skills", "search")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Tab:
    """A page of the browser that fails the test on any console message, error or request."""

    def __init__(self, browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.file = file
        self.faults: list[str] = []
        self.page.on("console", lambda m: self.faults.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith(file.as_uri()) else self.faults.append(r.url))

    def open(self, place: str = "") -> Any:
        self.page.goto(f"{self.file.as_uri()}#{place}")
        self.page.reload()  # another hash alone loads nothing
        self.page.wait_for_selector("body[data-ready]")
        return self.page

    def go(self, place: str) -> Any:
        self.page.evaluate("place => { location.hash = place }", place)
        self.page.wait_for_selector(f'body[data-ready="#{place}"]')
        return self.page


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    made: list[Tab] = []

    def open_tab(file: Path, place: str = "", **how: Any) -> Tab:
        made.append(Tab(browser, file, **how))
        made[-1].open(place)
        return made[-1]

    yield open_tab
    for one in made:
        one.context.close()
    assert [fault for one in made for fault in one.faults] == []


@pytest.fixture(scope="module")
def file(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run_folder, tmp_path_factory.mktemp("browser") / "run.html")[0]


@pytest.fixture(scope="module")
def table_file(table_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(table_folder, tmp_path_factory.mktemp("browser") / "table.html")[0]


def taught(run_folder: Path) -> Any:
    return next(group for group in open_run(run_folder).groups(3) if group.taught)


def test_all_six_views_by_clicks(tab: Any, file: Path) -> None:
    page = tab(file).page
    for name in VIEWS:
        page.get_by_role("navigation", name="Views").get_by_role("link", name=name.title(), exact=True).click()
        page.wait_for_selector(f'main[data-view="{name}"]')
        assert page.locator("h1").count() == 1
        if name == "curves":
            assert page.locator(".chart svg").count() > 8
            assert "Accuracy" in (page.locator(".chart").first.get_attribute("aria-label") or "")
    page.go_back()
    page.wait_for_selector('main[data-view="skills"]')


def test_an_episode_is_stepped_through(tab: Any, file: Path, run_folder: Path) -> None:
    group = taught(run_folder)
    opened = tab(file, f"episode=3/{group.task.id}/1")
    page, turns = opened.page, group.episodes[1].trajectory.turns
    assert page.locator(".count").inner_text() == f"turn 1 of {len(turns)}"
    assert "".join(page.locator(".turn .tokens .token").all_inner_texts()) == turns[0].action
    board = page.locator(".board").get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".count").first).to_have_text(re.compile(r"^turn 2 "))
    assert "turn=2" in page.url
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".count").first).to_have_text(re.compile(r"^turn 1 "))
    assert page.locator(".board").get_attribute("aria-label") == board
    page.get_by_label("Next turn (right arrow)").click()
    expect(page.locator(".count").first).to_have_text(re.compile(r"^turn 2 "))
    page.keyboard.press("j")
    expect(page.locator("h1").first).to_have_text(re.compile(r"^Episode 3"))
    page.keyboard.press("k")
    expect(page.locator("h1").first).to_have_text(re.compile(r"^Episode 2"))


def test_a_token_says_what_the_records_say(tab: Any, file: Path, run_folder: Path) -> None:
    group = taught(run_folder)
    episode = group.episodes[0]
    page = tab(file, f"episode=3/{group.task.id}/0").page
    page.locator(".turn .tokens .token").nth(1).hover()
    said = page.get_by_role("tooltip").inner_text()
    gap = episode.student_logprobs[1] - episode.teacher_logprobs[1]
    assert f"{100 * math.exp(episode.student_logprobs[1]):.3g}"[:3] in said
    assert f"{abs(gap):.2f}"[:3] in said
    shade = page.locator(".turn .tokens .token").nth(1).get_attribute("class")
    assert ("same" in shade) == (abs(gap) < 0.05)
    assert ("up" in shade) == (gap <= -0.05)
    added = page.locator(".diff ins").inner_text()
    assert added.strip() == (group.context_text or "").strip()


def test_deep_links(tab: Any, file: Path, run_folder: Path) -> None:
    task = taught(run_folder).task.id
    opened = tab(file, f"episode=3/{task}/2&turn=4")
    assert opened.page.locator(".count").inner_text().startswith("turn 4 of")
    opened.go("episode=99/none/0")
    assert "is not in this report" in opened.page.locator(".empty").inner_text()
    for odd in ("episode=%E0%A4%A/x/1", "nonsense", "curves&run=99", "episode=3//x&turn=zzz"):
        opened.open(odd)
        assert opened.page.locator("h1").count() == 1
    opened.go(f"skills={task}")
    opened.page.get_by_role("link", name="iteration 1, episode 1").first.click()
    opened.page.wait_for_selector('main[data-view="episode"]')


def test_search_and_filters(tab: Any, file: Path, run_folder: Path) -> None:
    page = tab(file).page
    page.keyboard.press("/")
    page.wait_for_selector("#query:focus")
    rows = page.locator("#found tbody tr")
    assert rows.count() == 36
    page.get_by_label("Outcome").select_option("1")
    solved = sum(e.trajectory.success for n in (1, 2, 3) for g in open_run(run_folder).groups(n) for e in g.episodes)
    assert rows.count() == solved
    page.get_by_label("Outcome").select_option("")
    page.get_by_label("Order").select_option("gap")
    gaps = [float(text.split()[-1].replace("−", "-")) for text in rows.locator("td:last-child").all_inner_texts()[:12]]
    assert gaps == sorted(gaps, key=abs, reverse=True)
    task = taught(run_folder).task.id
    page.locator("#query").fill(task)
    assert 0 < rows.count() < 36
    assert "q=" in page.url
    page.locator("#query").fill("@r")
    assert page.locator("#found").inner_text().endswith("No episode fits.")
    page.get_by_label("also in actions and observations").check()
    page.wait_for_selector("#found tbody tr")
    rows.first.get_by_role("link").click()
    page.wait_for_selector('main[data-view="episode"]')


HOSTILE = (
    "<img src=x onerror=window.hacked=1>", "</script><script>window.hacked=2</script>", "\u202ereversed\u202c",
    "javascript:window.hacked=3", "\x00\x1b[31m", "{{title}}",
)  # fmt: skip


def test_hostile_words_stay_words(tab: Any, tmp_path: Path) -> None:
    long = "<b onclick=window.hacked=4>" + "x" * 1_000_000
    short = {"environment": {"name": "sokoban", "options": {"max_steps": 3}}}
    words = [*HOSTILE, *WORDS[-4:]]
    folder = make_run(
        tmp_path / "run", iterations=3, tasks=1, group_size=2, thoughts=9, words=words, observation=long, settings=short
    )
    group = next(iter(open_run(folder).groups(3)))
    opened = tab(write_report(folder)[0], f"episode=3/{group.task.id}/0&turn=2")
    page = opened.page
    for view in VIEWS:
        opened.go("search=&q=x&texts=1" if view == "search" else view)
        page.wait_for_timeout(50)
    opened.go(f"episode=3/{group.task.id}/0&turn=2")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main b, main iframe, main script").count() == 0
    text = page.locator(".turn").inner_text()
    assert len(text) < 20_000, "cut"
    page.get_by_role("button", name="show all 1,000,0").first.click()
    assert len(page.locator(".turn").inner_text()) > 1_000_000
    assert page.locator(".invisible").count(), "control characters and marks of direction are visible"
    # The policy holds even against the page's own code.
    blocked = page.evaluate(
        """() => { try { document.body.innerHTML = '<p>x'; return false } catch (error) { return error.name } }"""
    )
    assert blocked == "TypeError"
    assert page.evaluate("() => fetch('https://example.org').then(() => 'sent', error => error.name)") == "TypeError"
    opened.faults[:] = [f for f in opened.faults if "TrustedHTML" not in f and "example.org" not in f]


WIDE = "document.documentElement.scrollWidth - innerWidth"

CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (el) => {
    for (; el; el = el.parentElement) {
      const found = parse(getComputedStyle(el).backgroundColor);
      if (found.length < 4 || found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  const poor = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const el = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim().slice(0, 20);
    if (!text || !el.checkVisibility() || el.closest("svg, script, :disabled, noscript")) continue;
    const [a, b] = [light(parse(getComputedStyle(el).color)), light(ground(el))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.add(`${el.tagName}.${el.className} "${text}" ${ratio.toFixed(2)}`);
  }
  return [...poor];
}"""
"""Texts with less contrast than WCAG's AA."""

NAMELESS = """() => [...document.querySelectorAll(
  "button, a, select, input, [role=img], [role=region], .chart"
)].filter((el) => !(
  el.getAttribute("aria-label") || el.textContent.trim() || (el.labels && el.labels.length)
)).map((el) => el.outerHTML.slice(0, 80))"""
"""Elements without an accessible name."""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_widths_colours_contrast_and_names(tab: Any, file: Path, table_file: Path, width: int, scheme: str) -> None:
    for which in (file, table_file):
        opened = tab(which, width=width, scheme=scheme)
        page = opened.page
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        for view in VIEWS:
            opened.go(view)
            assert page.evaluate(WIDE) <= 0, f"{view} scrolls sideways"
            assert page.evaluate(CONTRASTS) == [], view
            assert page.evaluate(NAMELESS) == [], view
            assert page.locator("h1").count() == 1


def test_keys_and_theme(tab: Any, file: Path) -> None:
    page = tab(file).page
    page.keyboard.press("3")
    page.wait_for_selector('main[data-view="groups"]')
    page.keyboard.press("t")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").inner_text().startswith("Keys")
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_a_table_shows_its_figures_and_all_runs(tab: Any, table_file: Path, table_folder: Path) -> None:
    opened = tab(table_file)
    page = opened.page
    rows = json.loads((table_folder / "table.json").read_text())["budgets"]["16"]
    for name, row in rows.items():
        text = page.get_by_role("row").filter(has_text=name).first.inner_text()
        assert f"{100 * row['accuracy']:.1f} %" in text
        assert f"[{100 * row['interval'][0]:.1f}, {100 * row['interval'][1]:.1f}]" in text
    assert "+1.9 [−1.0, +5.0]" in page.get_by_role("row").filter(has_text="skill-sd").first.inner_text()
    opened.go("curves")
    assert page.locator(".legend li").all_inner_texts() == ["grpo", "skill-sd"]
    page.get_by_label("Run", exact=True).select_option("skill-sd, seed 1")
    page.wait_for_url(re.compile("run=3"))
    opened.go("groups&run=3")
    assert page.locator("table.side").count() == 1


def test_what_is_missing_is_said(tab: Any, tmp_path: Path) -> None:
    """Views of runs that lack something: a method without a teacher, no episodes, nothing yet, still running."""
    plain = make_run(tmp_path / "plain", iterations=2, tasks=1, method="grpo")
    (plain / "skills.sqlite").unlink()
    opened = tab(write_report(plain)[0])
    opened.go("skills")
    assert "no skills" in opened.page.locator(".empty").inner_text()
    opened.go("episode")
    assert "had no teacher" in opened.page.locator("main").inner_text()
    shutil.rmtree(plain / TRAJECTORIES)
    opened = tab(write_report(plain)[0])
    for view in ("groups", "episode", "search"):
        opened.go(view)
        assert "The run wrote no episodes" in opened.page.locator(".empty").inner_text()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (plain / name).unlink()
    with locked(plain / LOCK, "it", "wait"):
        opened = tab(write_report(plain, reload_seconds=60)[0])
    assert "still training" in opened.page.locator(".banner").inner_text()
    assert "loads itself anew every 60 s" in opened.page.locator(".banner").inner_text()
    for view in VIEWS:
        opened.go(view)
        assert opened.page.locator("h1").count() == 1


@pytest.mark.slow
def test_five_thousand_episodes_load_in_three_seconds(tab: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=40, tasks=16, group_size=8)
    path, report = write_report(folder)
    assert sum(len(run["episodes"]["iteration"]) for run in report.light["runs"]) >= 4900
    assert path.stat().st_size < 30e6
    page = tab(path, "episode").page
    loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert loaded < 3000
