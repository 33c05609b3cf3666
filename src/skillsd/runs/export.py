"""Export a run's model: the weights as they were trained, or an adapter merged into its base model."""

from __future__ import annotations

import shutil
from pathlib import Path

from skillsd.errors import UserError
from skillsd.files.write import writing
from skillsd.runs.checks import engine_spec
from skillsd.runs.lifecycle import load_config
from skillsd.runs.sync import run_blocking
from skillsd.training import checkpoint


def export(run: str | Path, out: Path, *, iteration: int | None = None, merge: bool = False) -> None:
    """Write the student of a run's checkpoint to the folder `out`. If this fails, nothing is written.

    Without `merge`, the result is the same as the checkpoint's folder ``model``.

    Args:
        run: the run's folder.
        out: a new or empty folder.
        iteration: of the checkpoint; the last one if None.
        merge: merge the adapter into the base model's weights, which gives an ordinary model folder.

    Raises:
        UserError: if there is no such checkpoint, `out` is not empty, or there is no adapter to merge.
    """
    config = load_config(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is not empty: give a new folder")
    path = checkpoint.find(Path(run), iteration)
    engine = config.engine.for_learner().build(engine_spec(config))
    out = out.absolute()  # "." has no name
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)

    async def write() -> None:
        await checkpoint.load_weights(engine.learner, path)
        with writing(out, by_library=True):
            await engine.learner.export(aside, merge=merge)

    try:
        run_blocking(write())
        with writing(out):
            if out.is_dir():  # keep the folder itself: it may be a shell's current folder
                for file in aside.iterdir():
                    file.rename(out / file.name)
            else:
                aside.rename(out)
    finally:
        engine.close()
        shutil.rmtree(aside, ignore_errors=True)
