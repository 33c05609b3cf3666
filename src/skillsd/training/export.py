"""A run's model for others: the weights as they were trained, or an adapter merged into its base model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from skillsd import config as configs
from skillsd.config import EngineSection, RunConfig
from skillsd.errors import UserError
from skillsd.training import checkpoint
from skillsd.training.run import make_engine
from skillsd.training.scoring import is_run
from skillsd.training.session import CONFIG


def export(run: str, out: Path, *, iteration: int | None = None, merge: bool = False) -> None:
    """Write the student of a run's checkpoint (the last one if none is asked for) to the folder `out`.

    A checkpoint's own folder ``model`` holds the same, but for the merging. A new `out` is there whole or not at all.

    Args:
        merge: of an adapter: add it to the base model's weights, so that the folder is a model like any other.

    Raises:
        UserError: if there is no such checkpoint, `out` holds something, or there is nothing to merge.
    """
    if not is_run(run):
        raise UserError(f"{run!r} is not a run's folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} holds something already: give a new folder")
    config = configs.load(RunConfig, str(Path(run) / CONFIG))
    path = checkpoint.find(Path(run), iteration)
    # Whoever sampled, the weights are the embedded engine's.
    engine: Any = make_engine(config.model_copy(update={"engine": EngineSection()}))
    engine.load(path)
    if merge and not engine.lora:
        raise UserError(f"the run {run!r} trained all weights: there is no adapter to merge. Leave --merge out")
    out = out.absolute()  # "." has no name
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if merge:
            engine.model.merge_and_unload().save_pretrained(aside)
            engine.tokenizer.save_pretrained(aside)
        else:
            engine.save_weights(aside)
        if out.is_dir():  # it stays the same folder: somebody may stand in it
            for path in aside.iterdir():
                path.rename(out / path.name)
        else:
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
