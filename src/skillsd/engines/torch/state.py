"""The embedded engine's part of a checkpoint: exact training weights, optimiser, teacher, random state."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skillsd.engines.torch.optimiser import MasterAdamW
from skillsd.engines.torch.slices import gathered, own_part
from skillsd.errors import UserError
from skillsd.files.read import DamagedError

FILE = "engine.pt"
_KEYS = ("weights", "version", "optimiser", "teacher", "teacher_averages", "student_moved", "rng")


class Trained(Protocol):
    """What is saved of the embedded engine; see there."""

    device: torch.device
    trainable: dict[str, torch.nn.Parameter]
    optimiser: MasterAdamW
    teacher: dict[str, Tensor] | None
    teacher_averages: dict[str, Tensor]
    student_moved: bool
    version: int


def save(engine: Trained, path: Path, *, write: bool = True) -> None:
    """Write the engine's state. Of an engine in several ranks all have to call this, and one writes."""
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(engine.device)
    content = {
        # The exact training weights, in addition to the exported ones: an export may retie or rename.
        "weights": {name: p.detach() for name, p in engine.trainable.items()},
        "version": engine.version,
        "optimiser": engine.optimiser.state_dict(),
        "teacher": engine.teacher,
        "teacher_averages": engine.teacher_averages,
        "student_moved": engine.student_moved,
        "rng": rng,
    }
    content = gathered(content, keep=write)
    if write:
        torch.save(content, path)


def load(engine: Trained, path: Path, *, checked: bool = False) -> None:
    """Restore what `save` wrote, by any number of ranks. If it raises, the engine is unchanged.

    Args:
        checked: the file's checksums have been compared already.

    Raises:
        UserError: if there is no such file, it is damaged, or it belongs to another model or kind of teacher.
    """
    state = check(engine, path, checked=checked)
    with torch.no_grad():
        for name, parameter in engine.trainable.items():
            parameter.copy_(own_part(state["weights"][name], parameter))
    if engine.teacher is not None:
        for name, saved in (state["teacher"] or state["weights"]).items():  # in place, as graphs read these tensors
            engine.teacher[name].copy_(own_part(saved, engine.teacher[name]))
        averages = state["teacher_averages"].items()
        engine.teacher_averages = {n: own_part(a, engine.teacher[n]).to(engine.device, copy=True) for n, a in averages}
    engine.student_moved = state["student_moved"]
    engine.version = state["version"]
    engine.optimiser.load_state_dict(state["optimiser"])
    engine.optimiser.zero_grad()
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    if engine.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), engine.device)


def check(engine: Trained, path: Path, *, checked: bool = False) -> Mapping[str, Any]:
    """What `load` would restore, as parts of the file that are read when they are used.

    Raises:
        UserError: as `load`.
    """
    state = _read(path, checked=checked)
    if _forms(state["weights"]) != _forms(engine.trainable):
        raise UserError(
            f"the checkpoint {str(path.parent)!r} is of a different model: its weights have other names, shapes or "
            "dtypes. Load it with the model settings that wrote it"
        )
    if engine.teacher is not None and state["teacher"] is None and state["student_moved"]:
        raise UserError(
            f"the checkpoint {str(path.parent)!r} has no teacher weights: it was written by an engine whose teacher "
            "follows the student or is another model. Load it with the same teacher settings"
        )
    return state


def _read(path: Path, *, checked: bool) -> Mapping[str, Any]:
    """The content of the file. Unless they have been, its checksums are compared, which `torch.load` does not do."""
    if not path.is_file():
        raise DamagedError(path, "is missing", "it can't be loaded")
    try:
        with zipfile.ZipFile(path) as archive:
            if not checked and (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged}")
        # Mapped: several ranks take their slices of it, and none of them needs the whole in memory.
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _forms(state["weights"])
        _forms(state["teacher"] or {})
        _forms(state["teacher_averages"])
        return {key: state[key] for key in _KEYS}
    except Exception as error:  # damaged bytes raise almost anything: RuntimeError, EOFError, KeyError ...
        reason = " ".join(str(error).split()[:12]) or type(error).__name__
        raise DamagedError(path, f"is damaged ({reason})", "it can't be loaded") from error


def _forms(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
