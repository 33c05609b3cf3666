"""The package's structure: layers, no import circles, few loose modules, no long files. docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "skillsd"
ROOT = SOURCE.parents[1]

LAYERS = (
    ("cli", "__main__"),
    ("page",),
    ("sweeps",),
    ("runs",),
    ("training", "warm_start"),
    ("evaluation", "report"),
    ("skills",),
    ("rollouts",),
    ("prompting",),
    ("config",),
    ("envs",),
    ("engines",),
    ("objective",),
    ("methods", "options", "plugins", "cache", "user_code"),
    ("files",),
    ("errors", "metrics", "seeds", "types"),
)
"""From the top down: a module imports from its own layer and those below it."""

MAX_LINES = 400
MAX_LOOSE = 10

NOT_OURS = ("envs/appworld/host", "envs/appworld/world", "envs/textgames/host")
"""Run by another interpreter: they import nothing of the package."""


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file; the package itself is not among them: it imports lazily."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        if str(relative) == "__init__.py" or str(relative).startswith(NOT_OURS):
            continue
        parts = relative.with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports: at the top, inside functions, and for type annotations."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` imports the module; anything else is in the package's own file.
            targets = [member if member.removeprefix("skillsd.") in known else node.module for member in members]
        else:
            continue
        found |= {target.removeprefix("skillsd.") for target in targets if target.startswith("skillsd.")} & known
    return found - {name}


ALL = modules()


def layer_of(name: str) -> int:
    room = name.partition(".")[0]
    return next(place for place, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("name", ALL)
def test_imports_go_down(name: str) -> None:
    for target in sorted(imports(name, ALL[name], set(ALL))):
        assert layer_of(target) >= layer_of(name), f"{name} imports {target}, which is in a layer above it"


def test_there_is_no_import_circle() -> None:
    graph = {name: imports(name, path, set(ALL)) for name, path in ALL.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_few_modules_lie_loose() -> None:
    loose = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= MAX_LOOSE, loose


def test_every_room_has_a_layer() -> None:
    rooms = {name.partition(".")[0] for name in ALL}
    assert rooms == {room for layer in LAYERS for room in layer}


@pytest.mark.parametrize("folder", ["src", "benchmarks", "studies", "examples"])
def test_no_file_is_long(folder: str) -> None:
    """A longer one gives the reason in its docstring, as `Length: ...`."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_LINES:
            assert "Length: " in (ast.get_docstring(ast.parse(text)) or ""), (
                f"{path} has {len(text.splitlines())} lines"
            )


def test_documents_cite_only_what_is_here() -> None:
    """That the method's notes are not in this repository was overlooked once, in eight docstrings."""
    suffixes = {".py", ".md", ".yaml", ".toml", ".sh"}
    for path in sorted(ROOT.rglob("*")):
        if path.suffix in suffixes and not {".venv", "build", "runs", ".git"} & set(path.relative_to(ROOT).parts):
            name = "METHOD" + ".md"
            assert name not in path.read_text(encoding="utf-8"), path
