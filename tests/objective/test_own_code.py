"""Loss terms and estimators of your own: a wrong result is one clear error, before the run starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from skillsd.errors import UserError
from skillsd.objective import Objective, find_term
from skillsd.runs.trial import try_objective

SOURCE = """
import numpy as np
import torch
from skillsd.objective import sampled_token, whole_distribution
from skillsd.objective.distillation import DistillationTerms, Estimator

def number(student, signals): return 1.0
def nothing(student, signals): return None
def array(student, signals): return student.chosen.detach().numpy()
def mean(student, signals): return student.chosen.mean()
def wide(student, signals): return student.chosen.unsqueeze(1) * torch.ones(3)
def longer(student, signals): return torch.cat([student.chosen, student.chosen])
def detached(student, signals): return -student.chosen.detach()
def zeros(student, signals): return torch.zeros(len(student.chosen))
def no_grad(student, signals):
    with torch.no_grad():
        return -student.chosen
def triple(student, signals): return student.chosen, {}, 1
def bad_log(student, signals): return student.chosen, {"x": 1.0}
def log_list(student, signals): return student.chosen, [student.chosen]
def log_scalar(student, signals): return student.chosen, {"x": student.chosen.mean()}
def raises(student, signals):
    return student.chosen + signals["no_such_signal"]
def shape(student, signals): return student.chosen + torch.ones(77)
def exits(student, signals): raise SystemExit(1)
def fine(student, signals): return -student.chosen, {"rate": signals["advantages"] > 0}
def some(student, signals): return -student.chosen[signals["advantages"] > 0]

@sampled_token
def one(log_rho, log_ratio): return log_ratio
@sampled_token
def floats(log_rho, log_ratio): return 1.0, log_ratio
@sampled_token
def scalars(log_rho, log_ratio): return log_ratio.mean(), log_ratio
@sampled_token
def integers(log_rho, log_ratio): return torch.ones(len(log_rho), dtype=torch.int64), log_ratio
@sampled_token
def fails(log_rho, log_ratio): return {}["x"]
@sampled_token
def good(log_rho, log_ratio): return log_ratio, log_ratio
@whole_distribution
def not_summed(log_p, log_q): return log_p - log_q
@whole_distribution
def python_sum(log_p, log_q): return sum(log_p.flatten().tolist())
@whole_distribution
def constant(log_p, log_q): return log_q.exp().sum(-1)
@whole_distribution
def good_exact(log_p, log_q): return (log_p.exp() * (log_p - log_q)).sum(-1)

tuple_terms = Estimator(lambda student, teacher, old: (student.chosen, student.chosen))
short_terms = Estimator(lambda student, teacher, old: DistillationTerms(student.chosen[:1], old[:1]))
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_losses.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_losses", None)


def term(name: str, weight: float = 1.0) -> Objective:
    return Objective(extra_terms=(find_term(name, f"own_losses:{name}", weight, "action_mask"),))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("number", "of type float, expected one loss per token, [5]"),
        ("nothing", "of type NoneType, expected one loss per token"),
        ("array", "of type ndarray"),
        ("mean", "a tensor of float32 [], expected"),
        ("wide", "a tensor of float32 [5, 3], expected"),
        ("longer", "a tensor of float32 [10], expected"),
        ("detached", "have no gradient"),
        ("zeros", "have no gradient"),
        ("no_grad", "have no gradient"),
        ("triple", "a tuple of 3 (Tensor, dict, int), expected losses"),
        ("bad_log", "logs 'x' as of type float"),
        ("log_list", "a tuple of 2 (Tensor, list), expected losses"),
        ("log_scalar", "logs 'x' as a tensor of float32 []"),
        ("raises", "KeyError: 'no_such_signal' ("),
        ("shape", "own_losses.py:"),
        ("exits", "SystemExit: 1 ("),
    ],
)
def test_a_term_that_returns_something_else(name: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        try_objective(term(name))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fine", "some"])
def test_a_term_that_fits(name: str) -> None:
    try_objective(term(name))
    try_objective(term("detached", weight=0.0))  # it is only logged


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", "'one' returned a tensor of float32 [5], expected a pair: weight and value"),
        ("floats", "the weight of the estimator 'floats' is of type float, expected"),
        ("scalars", "the weight of the estimator 'scalars' is a tensor of float32 []"),
        ("integers", "the weight of the estimator 'integers' is a tensor of int64 [5]"),
        ("fails", "KeyError: 'x' ("),
        ("not_summed", "the value of the estimator 'not_summed' is a tensor of float32 [5, 8]"),
        ("python_sum", "the value of the estimator 'python_sum' is of type float"),
        ("constant", "have no gradient"),
        ("tuple_terms", "returned tuple, expected DistillationTerms"),
        ("short_terms", "the surrogate of the estimator 'own_losses:short_terms' is a tensor of float32 [1]"),
    ],
)
def test_an_estimator_that_returns_something_else(name: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        try_objective(Objective(estimator=f"own_losses:{name}"))
    assert expected in str(error.value)


@pytest.mark.parametrize("options", [{}, {"distil_clamp": 0.1}, {"importance_cap": 2.0}, {"lambda_sdl": 0.0}])
@pytest.mark.parametrize("estimator", ["iw_k3", "k1", "reverse_kl", "own_losses:good", "own_losses:good_exact"])
def test_what_fits_is_accepted(estimator: str, options: dict[str, Any]) -> None:
    try_objective(Objective(estimator=estimator, **options))
    if estimator in ("reverse_kl", "own_losses:good_exact"):
        try_objective(Objective(estimator=estimator, top_k=100, **options))


def test_the_same_error_during_training(tiny_model: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toy_run import go

    terms = [{"name": "later", "fn": "own_losses:fine"}]
    run = make_run(objective={"terms": terms})
    module = sys.modules["own_losses"]
    monkeypatch.setattr(module.fine, "__code__", module.mean.__code__)
    with pytest.raises(UserError, match="the loss term 'later' is a tensor of float32 \\[\\]"):
        go(run)
    assert torch.is_grad_enabled()
