"""The adapter as files: downloaded from the server, in peft's format, or merged into the base model's weights."""

from __future__ import annotations

import asyncio
import json
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from skillsd.engines.spec import EngineSpec, LoraOptions
from skillsd.engines.tinker.service import Service
from skillsd.errors import EngineFailedError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 300.0
"""Deadline of one read of a download."""


async def download(service: Service, trainer: Any, name: str, folder: Path) -> None:
    """Save the weights of `trainer` at the server under `name`, and write the adapter into `folder`.

    Raises:
        EngineFailedError: if the download fails, or holds no adapter.
    """
    if hasattr(trainer, "save_weights_external"):
        saved = await service.call("exported weights", lambda: trainer.save_weights_external(name))
        found = await service.call("their addresses", lambda: service.rest.get_external_weights_urls(saved.path))
        await asyncio.to_thread(_fetch_files, found.urls, folder)
    else:  # SDK 0.25
        saved = await service.call("saved weights", lambda: trainer.save_weights_for_sampler(name))
        run, _, checkpoint = saved.path.removeprefix("tinker://").partition("/")  # SkyRL's has two parts, not three
        found = await service.call(
            "their address", lambda: service.rest.get_checkpoint_archive_url(run, checkpoint), repeatable=True
        )
        await asyncio.to_thread(_fetch_archive, found.url, folder)
    _complete(folder)


async def write_merged(service: Service, trainer: Any, name: str, folder: Path, spec: EngineSpec) -> None:
    """Write the base model of ``model.name`` with the adapter merged into it, in the format of ``transformers``."""
    import torch

    from skillsd.engines.torch import export
    from skillsd.engines.torch.models import load_model

    with tempfile.TemporaryDirectory(prefix="skillsd-adapter-") as temporary:
        await download(service, trainer, name, Path(temporary))
        adapter = LoraOptions(adapter=temporary)
        model, _ = load_model(spec.model, dtype=spec.dtype, device=torch.device("cpu"), lora=adapter)
        export.write_merged(model, folder, untie=False)


def _fetch_files(urls: Mapping[str, str], folder: Path) -> None:
    for file, url in urls.items():
        target = (folder / file).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise EngineFailedError(f"the server names a file outside of the adapter's folder: {file!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, target)


def _fetch_archive(url: str, folder: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        _fetch(url, Path(archive.name))
        try:
            with tarfile.open(archive.name) as files:
                files.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise EngineFailedError(f"the downloaded adapter is no archive ({error}): export it again") from error


def _fetch(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer, open(target, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
    except OSError as error:  # includes HTTP errors and timeouts
        raise EngineFailedError(f"the adapter could not be downloaded: {error}. Export it again") from None


def _complete(folder: Path) -> None:
    """Name the modules of the adapter in its configuration, where the server did not.

    SkyRL writes ``target_modules: null``, which peft takes for the query and value projections: it would load those,
    and leave the others out without an error.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise EngineFailedError(f"the server exported no adapter in peft's format, but {names}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("target_modules"):
        return
    with safe_open(folder / WEIGHTS, "pt") as weights:
        modules = {name.split(".lora_")[0].rpartition(".")[2] for name in weights.keys() if ".lora_" in name}  # noqa: SIM118
    config["target_modules"] = sorted(modules)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
