"""The documentation: generated tables are up to date, links resolve, and every metric of a run is described."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_env import Toy
from toy_run import toy_settings

from skillsd.config import RunConfig
from skillsd.runs.lifecycle import run_training
from skillsd.training import metric_docs
from skillsd.types import Task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


# -- generated blocks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs() -> Iterator[ModuleType]:
    """The module docs/render.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("render")


def test_generated_blocks_are_up_to_date() -> None:
    """Every block has a renderer, every renderer a block, and no block is stale."""
    command = [sys.executable, ROOT / "docs" / "render.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


BLOCK = "before\n<!-- generated: one -->\n{}<!-- end -->\nafter\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(BLOCK.format("old\n"))
    (tmp_path / "docs" / "results" / "page.md").write_text(BLOCK.format(""))
    return tmp_path


def test_stale_blocks_are_named_and_rendered(docs: ModuleType, project: Path) -> None:
    readme = project / "README.md"
    renderers = {"one": lambda: "new"}
    expected = ["README.md: one", "docs/results/page.md: one"]
    assert docs.render_all(project, renderers, write=False) == expected
    assert readme.read_text() == BLOCK.format("old\n")
    assert docs.render_all(project, renderers, write=True) == expected
    assert readme.read_text() == BLOCK.format("new\n")
    assert docs.render_all(project, renderers, write=True) == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- generated: oen -->\n<!-- end -->\n", r"README.md:1: no renderer for the block 'oen'. Known: one"),
        ("<!-- generated: one -->\n", r"README.md: the block 'one' has no '<!-- end -->'"),
        ("<!-- generated: one -->\n<!-- generated: one -->\n", "README.md:2: found .*, expected '<!-- end -->'"),
        ("<!-- generated:one -->\n<!-- end -->\n", "README.md:1: found .*, expected '<!-- generated: NAME -->'"),
        ("\n<!-- end -->\n", "README.md:2: found .*, expected '<!-- generated: NAME -->'"),
    ],
)
def test_wrong_markers_are_errors(text: str, error: str, docs: ModuleType, project: Path) -> None:
    (project / "README.md").write_text(text)
    with pytest.raises(docs.DocsError, match=error):
        docs.render_all(project, {"one": lambda: "new"}, write=True)
    assert (project / "README.md").read_text() == text


def test_a_renderer_without_a_block_is_an_error(docs: ModuleType, project: Path) -> None:
    with pytest.raises(docs.DocsError, match="no page has a block for the renderers two"):
        docs.render_all(project, {"one": lambda: "new", "two": lambda: ""}, write=True)
    assert "new" not in (project / "README.md").read_text()


def test_recomputed_sweep_statistics_agree_with_the_json(docs: ModuleType) -> None:
    """The renderer computes them from the results by seed, because the JSON is rounded to four digits."""
    sweeps = importlib.import_module("blocks.sweeps")
    tables = json.loads((ROOT / "docs" / "results" / "sokoban.json").read_text())["tables"]
    for name, table in tables.items():
        for budget, methods in table["budgets"].items():
            for method, row in methods.items():
                found = sweeps.estimate(sweeps.cells(name, budget, method), "accuracy", "models")
                assert [found.mean, *found.interval] == pytest.approx([row["accuracy"], *row["interval"]], abs=6e-5)


# -- pages ----------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to the headings of a page."""
    found: Counter[str] = Counter()
    ids = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        ids.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return ids


@pages
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pages
def test_rows_of_a_table_have_equally_many_cells(page: Path) -> None:
    columns = 0
    for number, line in enumerate(prose(page).splitlines(), 1):
        if not line.startswith("|"):
            columns = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        columns = columns or cells
        assert cells == columns, f"{name_of(page)}: row {number} has {cells} cells, expected {columns}: {line}"


def test_readme_is_short() -> None:
    assert 60 <= len((ROOT / "README.md").read_text().splitlines()) <= 80


# -- metrics --------------------------------------------------------------------------------------------------------


class WithOracle(Toy):
    def oracle(self, task: Task) -> str | None:
        return f"@r1c1 {task.payload['target']}"


RUNS: dict[str, dict[str, Any]] = {
    "skill-sd, hindsight, exact divergence": {
        "skills": {"hindsight": True},
        "objective": {"estimator": "reverse_kl", "distil_clamp": 1.0},
        "evaluation": {"greedy": True},
    },
    "uplift credit": {"skills": {"credit": "uplift", "uplift_episodes": 1}},
    "importance cap": {"objective": {"importance_cap": 2.0, "estimator": "forward_kl", "top_k": 2}},
    "self-imitation": {"method": "grpo-imitation", "training": {"epochs": 2}},
    "oracle": {"method": "grpo-opsd", "environment": {"name": "test_docs:WithOracle"}},
    "skill in the student's prompt": {"method": "skill-grpo", "summariser": {"price_in": 1.0, "price_out": 1.0}},
}
"""Settings that between them turn on every group of metrics that a run on the CPU can emit."""


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS)
def test_every_metric_of_a_run_is_described(sections: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    settings = toy_settings(tiny_model, **sections)
    settings["training"]["iterations"] = 4
    assert run_training(RunConfig.model_validate(settings), tmp_path / "run")
    emitted = {
        name
        for file in ("metrics.jsonl", "evaluations.jsonl")
        for line in (tmp_path / "run" / file).read_text().splitlines()
        for name in json.loads(line)
    }
    assert {"rollout/reward", "eval/accuracy"} <= emitted
    found = {name: metric_docs.describe(name) for name in emitted}
    assert [name for name, doc in found.items() if doc is None] == []
    # "loss/*" is for terms of the user's own, which these runs do not have.
    assert [name for name, doc in found.items() if doc and doc.name == "loss/*"] == []


def test_an_unknown_metric_is_not_described() -> None:
    assert metric_docs.describe("foo/bar") is None


def test_each_metric_is_described_once() -> None:
    names = [doc.name for doc in metric_docs.DOCS]
    assert len(names) == len(set(names))
