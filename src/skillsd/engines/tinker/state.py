"""The engine's part of a checkpoint: where the server keeps the state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from skillsd.errors import UserError
from skillsd.files.read import DamagedError, read_json_object
from skillsd.files.write import write_whole

FILE = "tinker.json"


@dataclass(frozen=True)
class State:
    """A state at the server.

    Attributes:
        path: of weights and optimiser there.
        base_model: what the adapter belongs to.
        teacher: path of a snapshot teacher's weights; None if it is the base model, or follows the student.
    """

    path: str
    base_model: str
    version: int
    student_moved: bool
    teacher: str | None


def write(folder: Path, state: State) -> None:
    write_whole(folder / FILE, json.dumps(asdict(state), indent=2))


def read(folder: Path, base_model: str) -> State:
    """What `write` wrote.

    Raises:
        DamagedError: if the file is missing or damaged.
        UserError: if the state is another engine's or another base model's.
    """
    path, remedy = folder / FILE, "it can't be loaded"
    if not path.exists() and (folder / "engine.pt").exists():
        raise UserError(
            f"the checkpoint {str(folder)!r} is of the embedded engine, which the engine 'tinker' can't load: set "
            "engine.name=torch"
        )
    found = read_json_object(path, remedy, [field.name for field in fields(State)])
    state = State(**{field.name: found[field.name] for field in fields(State)})
    if not (isinstance(state.path, str) and isinstance(state.version, int) and isinstance(state.student_moved, bool)):
        raise DamagedError(path, "is damaged (a value is of the wrong kind)", remedy)
    if state.base_model != base_model:
        raise UserError(
            f"the checkpoint {str(folder)!r} is of the base model {state.base_model!r}, but this engine's is "
            f"{base_model!r} (engine.base_model, by default model.name)"
        )
    return state
