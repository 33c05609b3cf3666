"""The embedded engine's part of a checkpoint: exact training weights, optimiser, teacher, random state."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skillsd.engines.torch.optimiser import MasterAdamW
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


def save(engine: Trained, path: Path) -> None:
    """Write the engine's state."""
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(engine.device)
    torch.save(
        {
            # The exact training weights, in addition to the exported ones: an export may retie or rename.
            "weights": {name: p.detach() for name, p in engine.trainable.items()},
            "version": engine.version,
            "optimiser": engine.optimiser.state_dict(),
            "teacher": engine.teacher,
            "teacher_averages": engine.teacher_averages,
            "student_moved": engine.student_moved,
            "rng": rng,
        },
        path,
    )


def load(engine: Trained, path: Path) -> None:
    """Restore what `save` wrote. If it raises, the engine is unchanged.

    Raises:
        UserError: if there is no such file, it is damaged, or it belongs to another model or kind of teacher.
    """
    state = _read(path)
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
    with torch.no_grad():
        for name, parameter in engine.trainable.items():
            parameter.copy_(state["weights"][name])
    if engine.teacher is not None:
        for name, saved in (state["teacher"] or state["weights"]).items():  # in place, as graphs read these tensors
            engine.teacher[name].copy_(saved)
        engine.teacher_averages = _copies(state["teacher_averages"], engine.device)
    engine.student_moved = state["student_moved"]
    engine.version = state["version"]
    engine.optimiser.load_state_dict(state["optimiser"])
    engine.optimiser.zero_grad()
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    if engine.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), engine.device)


def _read(path: Path) -> Mapping[str, Any]:
    """The content of the file. Its checksums are compared, which `torch.load` does not do."""
    if not path.is_file():
        raise DamagedError(path, "is missing", "it can't be loaded")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged}")
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        _forms(state["weights"])
        _forms(state["teacher"] or {})
        _forms(state["teacher_averages"])
        return {key: state[key] for key in _KEYS}
    except Exception as error:  # damaged bytes raise almost anything: RuntimeError, EOFError, KeyError ...
        reason = " ".join(str(error).split()[:12]) or type(error).__name__
        raise DamagedError(path, f"is damaged ({reason})", "it can't be loaded") from error


def _copies(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in weights.items()}


def _forms(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
