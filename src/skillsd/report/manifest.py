"""The manifest of a run, for reproducing and comparing it: versions, commit, seed, task fingerprints, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skillsd.config import RunConfig
from skillsd.envs.base import TaskSet
from skillsd.files.write import write_whole
from skillsd.methods import method
from skillsd.prompting.templates import load_template
from skillsd.skills.summary_prompt import load_prompt

PACKAGES = ("skillsd", "torch", "transformers", "tokenizers", "numpy", "peft")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``+changes`` if it is modified; None if installed."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


MODEL_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "adapter_config.json"),
)
"""The files of a model's folder that decide its answers, apart from the weights: architecture, tokenizer, template."""


def model(name: str) -> dict[str, str | None]:
    """A base model's name, with the fingerprints of its weights and of its `MODEL_FILES`: what a name stands for may
    change."""
    return {"name": name, **_content(_folder(name))}


def adapter(folder: str) -> dict[str, str | None]:
    """The same for the folder of an adapter in peft's format."""
    return {"name": folder, **_content(Path(folder).expanduser())}


def models(config: RunConfig) -> dict[str, dict[str, str | None]]:
    """The models that a run starts from: the base ``model``, and the ``adapter`` and ``teacher`` if it has them."""
    found = {"model": model(config.model.name)}
    if config.model.adapter:
        found["adapter"] = adapter(config.model.adapter)
    if config.teacher.model:
        found["teacher"] = model(config.teacher.model)
    return found


def changed_models(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """The models of a run, in words, whose files differ from those in `before`, its manifest."""
    return [
        f"{part} {now['name']!r}"
        for part, now in models(config).items()
        for old in [before.get(part, {})]
        if any(now[key] and old.get(key) and now[key] != old[key] for key in ("weights", "files"))
    ]


def texts(config: RunConfig) -> dict[str, str]:
    """Hashes of the template and the prompt that a run's skills depend on, by key: a name may be a file of the user."""
    row = method(config.method)
    found = (
        {"skills.template": load_template(config.skills.template)} if row.context != "none" or row.uses_skills else {}
    )
    if row.uses_skills and config.skills.summariser in ("openai", "policy"):
        found["summariser.prompt"] = load_prompt(config.summariser.prompt)
    return {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in found.items()}


def _content(folder: Path | None) -> dict[str, str | None]:
    if folder is None:
        return {"weights": None, "files": None}
    files = [path for name in MODEL_FILES if (path := folder / name).is_file()]
    return {"weights": fingerprint(folder), "files": _digest(files, names=True)}


def weights_fingerprint(name: str) -> str | None:
    """`fingerprint` of a model's folder, or of a hub model in the local cache. None if there are no weights."""
    folder = _folder(name)
    return fingerprint(folder) if folder else None


def fingerprint(folder: Path) -> str | None:
    """The first 16 hex digits of the SHA-256 of a folder's weight files (``*.safetensors``, else ``*.bin``), ordered by
    name. None if there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return _digest(files) if files else None


def _digest(files: Sequence[Path], *, names: bool = False) -> str:
    """The first 16 hex digits of the SHA-256 of files; with `names`, of their names and sizes too."""
    digest = hashlib.sha256()
    for path in files:
        if names:
            digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _folder(name: str) -> Path | None:
    """The folder of a model: a local one, or a hub model's in the local cache."""
    from skillsd.engines.torch.models import resolve

    folder = Path(resolve(name)).expanduser()
    return folder if (folder / "config.json").is_file() else _cached(name)


def _cached(name: str) -> Path | None:
    """The folder of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid hub name
        return None
    return Path(config).parent if isinstance(config, str) else None


def write(folder: Path, config: RunConfig, task_set: TaskSet) -> dict[str, Any]:
    """Write manifest.json."""
    import torch

    manifest = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "seed": config.seed,
        "method": config.method,
        **models(config),
        "texts": texts(config),
        "panels": {split: task_set.fingerprint(split) for split in task_set.splits},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=2))
    return manifest
