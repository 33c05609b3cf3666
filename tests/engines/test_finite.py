"""Nan and infinity in what a model computes stop with the reason, in sampling and scoring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines.tiny import DATA, embedded, sample_all, torch_engine, view
from skillsd.engines.base import Sample, SampleRequest
from skillsd.engines.torch.sampling import choose
from skillsd.errors import EngineFailedError, UserError

Folder = Callable[[str], Path]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choice_among_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(FloatingPointError, match="nan or infinite"):
        choose(logits, [temperature] * 2, [0.5, 0.5])
    logits[1, 3] = -torch.inf  # an impossible token
    assert choose(logits, [temperature] * 2, [0.5, 0.5])[0][1] != 3


def test_samples_log_probs_are_finite() -> None:
    """Those of any engine, in another process too."""
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(EngineFailedError, match=r"not finite .* after update 3: .*lower training\.learning_rate"):
            Sample((1, 2), (-0.1, bad), "stop", 3)


@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight"])
def test_damaged_weights(where: str, model_folder: Folder) -> None:
    engine = embedded(model_folder("llama-untied"))
    request = SampleRequest(tokens=tuple(DATA.ids(8, 0)), max_tokens=6, seed=0)
    with torch.no_grad():
        torch_engine(engine).model.get_parameter(where)[3] = torch.nan
    with pytest.raises(EngineFailedError, match="student's logits are not finite"):
        sample_all(engine, [request, request])
    with pytest.raises(EngineFailedError, match="student's log-probs are not finite"):
        view(engine)


def test_damaged_weights_in_a_folder(model_folder: Folder, tmp_path: Path) -> None:
    engine = embedded(model_folder("llama-untied"))
    with torch.no_grad():
        torch_engine(engine).model.get_parameter("model.norm.weight")[3] = torch.nan
    torch_engine(engine).save_weights(tmp_path)
    with pytest.raises(UserError, match="predicts nan: its weights are damaged"):
        embedded(tmp_path)
