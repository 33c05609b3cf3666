"""One step off: an iteration's rollouts are sampled while the one before is trained."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import Listener, MakeRun, go, toy_settings, without_clocks
from transformers import AutoModelForCausalLM
from two_copies import Copy, Watched

from skillsd.config import RunConfig
from skillsd.errors import EngineFailedError, UserError
from skillsd.runs.checks import check_config, in_turn_note
from skillsd.runs.lifecycle import run_training, run_training_async
from skillsd.training import checkpoint
from skillsd.training.loop import train
from skillsd.training.run import Run

AHEAD: dict[str, Any] = {
    "training": {"ahead": 1, "minibatches": 1},
    "objective": {"importance_cap": 2.0},
    "log": {"trajectories_every": 1},
}
ENGINES = ("torch", "two_copies:TwoCopies")
"""One that samples ahead before it trains, and one that samples while it trains."""


def settings(engine: str = "torch", **more: dict[str, Any]) -> dict[str, Any]:
    merged = {name: {**AHEAD.get(name, {}), **more.get(name, {})} for name in {**AHEAD, **more}}
    return {**merged, "engine": {"name": engine}}


def weights(run: Run) -> list[torch.Tensor]:
    learner: Any = run.learner
    return [p.detach().clone() for p in learner.model.parameters()]


def same_weights(one: Run, other: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# -- lag --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("minibatches", "updates"), [(1, 1), (2, 2)])
def test_rollouts_are_exactly_one_iteration_old(make_run: MakeRun, engine: str, minibatches: int, updates: int) -> None:
    listener = go(make_run(**settings(engine, training={"minibatches": minibatches})))
    lags = [record["rollout/policy_lag"] for record in listener.iterations]
    assert lags == [0, *[updates] * 5]
    versions = [{t.versions for g in listener.groups[i : i + 3] for t in g.trajectories} for i in range(0, 18, 3)]
    sampled = [0, *(minibatches * n for n in range(5))]
    assert versions == [{(n, n)} for n in sampled], "all of one version each"
    # The sampler's log-probs are of other weights, which is no error: only the first iteration's can be compared.
    assert ["sampler_trainer_logprob_diff/max" in record for record in listener.iterations] == [True] + [False] * 5
    assert any(abs(record["loss/importance"] - 1) > 1e-4 for record in listener.iterations[1:])


def test_both_kinds_of_engine_give_the_same_figures_twice(make_run: MakeRun) -> None:
    runs = [make_run(f"{number}", **settings(engine)) for number, engine in enumerate(ENGINES * 2)]
    first, *others = [go(run) for run in runs]
    for run, listener in zip(runs[1:], others, strict=True):
        assert without_clocks(listener.iterations) == without_clocks(first.iterations)
        assert without_clocks(listener.evaluations) == without_clocks(first.evaluations)
        assert listener.groups == first.groups
        assert same_weights(run, runs[0])
    assert without_clocks(first.iterations) != without_clocks(go(make_run("in-turn")).iterations)


def test_rollouts_and_training_overlap_but_evaluations_have_the_sampler_to_themselves(make_run: MakeRun) -> None:
    run = make_run(**settings("two_copies:TwoCopies", evaluation={"every": 1}))
    assert isinstance(run.learner, Watched)
    log, listener = run.learner.log, Listener()
    listener.evaluation = lambda record: log.append("evaluation")  # type: ignore[method-assign]
    real = run.learner.logprobs

    async def logprobs(*args: Any, **options: Any) -> Any:
        log.append("score")
        return await real(*args, **options)

    run.learner.logprobs = logprobs  # type: ignore[method-assign]
    asyncio.run(train(run, listener))
    iterations = " ".join(log).split("evaluation")[1:-1]
    for words in [iteration.split() for iteration in iterations[:-1]]:
        first, step = words.index("score"), words.index("step")
        assert "verified" in words[:first], "the learner is left alone until the weights have been checked"
        assert "sample" in words[first:step], "sampled while it trained"
        assert words.count("sleep") == 0
    assert iterations[-1].split().count("sleep") == 1, "nothing is sampled ahead in the last iteration"


def test_the_last_iterations_rollouts_are_not_thrown_away(make_run: MakeRun) -> None:
    toy = Toy()
    go(make_run(toy=toy, **settings(evaluation={"every": 0, "limit": 1}, training={"iterations": 3})))
    assert sum(e.resets != [] for e in toy.made) == 3 * 12 + 2


# -- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1e9, 1.05])
def test_the_gradient_of_old_rollouts_is_importance_weighted(make_run: MakeRun, tiny_model: Path, cap: float) -> None:
    """grad = - sum min(pi / mu, cap) A grad log pi / N, with mu as recorded at sampling and pi the current weights,
    computed here by plain forward passes, one episode at a time."""
    make = {"training": {"iterations": 2, "learning_rate": 3e-2}, "objective": {"importance_cap": cap}}
    run = make_run(**{**settings(**make), "method": "grpo"})
    learner: Any = run.learner
    found: dict[str, list[torch.Tensor]] = {}
    listener, step = Listener(), learner._step

    def watched(rate: float) -> Any:
        found["weights"] = weights(run)
        found["gradient"] = [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]
        return step(rate)

    learner._step = watched
    asyncio.run(train(run, listener))

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    for parameter, value in zip(model.parameters(), found["weights"], strict=True):
        parameter.data.copy_(value)
    episodes = [e for group in listener.groups[3:] for e in group.episodes]
    count = sum(e.trajectory.action_tokens for e in episodes)
    capped = 0
    for episode in episodes:
        t = episode.trajectory
        logits = model(input_ids=torch.tensor([t.tokens]), use_cache=False).logits[0, :-1].log_softmax(-1)
        mask = torch.tensor(t.action_mask[1:])
        logprobs = logits.gather(1, torch.tensor(t.tokens[1:])[:, None])[:, 0][mask]
        ratio = (logprobs.detach() - torch.tensor(episode.old_logprobs)).exp()
        capped += int((ratio > cap).sum())
        (-(ratio.clamp(max=cap) * episode.advantage * logprobs).sum() / count).backward()
    assert capped if cap < 2 else not capped
    plain = torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])
    ours = torch.cat([g.ravel() for g in found["gradient"]])
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_importance_weights_make_old_rollouts_unbiased() -> None:
    """Enumeration: over y ~ mu, the mean of the term's gradient is the policy gradient at pi, to rounding."""
    from skillsd.objective.logprobs import TokenLogprobs
    from skillsd.objective.policy_gradient import PolicyGradient

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    mu = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    pi = logits.log_softmax(-1)
    [exact] = torch.autograd.grad(-(pi.exp() * advantages).sum(), logits, retain_graph=True)

    def mean_gradient(cap: float | None) -> torch.Tensor:
        signals = {"old_logprobs": mu, "advantages": advantages, "rescored_logprobs": pi.detach()}
        loss, _ = PolicyGradient(importance_cap=cap)(TokenLogprobs(pi), signals)
        [found] = torch.autograd.grad((mu.exp() * loss).sum(), logits, retain_graph=True)
        return found

    assert torch.allclose(mean_gradient(1e9), exact, atol=1e-12)
    assert not torch.allclose(mean_gradient(None), exact, atol=1e-2), "the clipped ratio alone is biased"


# -- stop and resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path, engine: str) -> None:
    config = RunConfig.model_validate(toy_settings(tiny_model, **settings(engine)))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_training(config, whole)
    stops = iter([False, False, False, True])
    assert not asyncio.run(run_training_async(config, stopped, should_stop=lambda: next(stops)))
    assert checkpoint.iterations(stopped) == [2, 3]
    assert run_training(config, stopped, resume=True)
    assert_same(whole, stopped)


def test_a_run_that_fails_in_the_middle_of_a_batch_goes_on_bit_for_bit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the rollouts of iteration 5 are sampled and iteration 4 is trained; the last checkpoint is of 2."""
    config = of_two_copies(tiny_model)
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert run_training(config, whole)
    real = Copy.sample

    async def sample(self: Copy, request: Any) -> Any:
        if self._version == 3 and len(self.log) % 7 == 0:
            raise EngineFailedError("out of memory")
        return await real(self, request)

    monkeypatch.setattr(Copy, "sample", sample)
    with pytest.raises(EngineFailedError, match="out of memory"):
        run_training(config, failed)
    monkeypatch.undo()
    assert (checkpoint.iterations(failed), len(records(failed))) == ([2], 3)
    assert run_training(config, failed, resume=True)
    assert_same(whole, failed)


def of_two_copies(model: Path) -> RunConfig:
    return RunConfig.model_validate(toy_settings(model, **settings("two_copies:TwoCopies")))


KILLED = """
import os, signal, sys
from pathlib import Path
from skillsd.config import RunConfig
from skillsd.runs import lifecycle
from two_copies import Copy

real, calls = Copy.sample, []
async def sample(self, request):
    calls.append(request)
    if self._version == 3 and len([c for c in calls if c.session == request.session]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return await real(self, request)
Copy.sample = sample
import torch
torch.set_num_threads(1)
lifecycle.run_training(RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_of_a_batch_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    config = of_two_copies(tiny_model)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_training(config, whole)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(killed)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert checkpoint.iterations(killed) == [2]
    assert len(records(killed)) == 3
    assert run_training(config, killed, resume=True)
    assert_same(whole, killed)


@pytest.mark.parametrize(("engine", "noted"), [("torch", True), ("two_copies:TwoCopies", False)])
def test_a_run_that_gains_no_time_says_so(engine: str, noted: bool, tiny_model: Path) -> None:
    config = RunConfig.model_validate(toy_settings(tiny_model, **settings(engine)))
    assert bool(in_turn_note(config)) == noted
    assert in_turn_note(RunConfig.model_validate(toy_settings(tiny_model))) is None


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    assert without_clocks(records(one)) == without_clocks(records(other))
    ours, theirs = (torch.load(f / "checkpoints/step-6/engine.pt") for f in (one, other))
    for part in ours.keys() - {"rng"}:  # a copy of the engine is made at random before it is loaded
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    for name in ("iteration-00004", "iteration-00006"):
        assert (one / f"trajectories/{name}.jsonl.gz").read_bytes() == (
            other / f"trajectories/{name}.jsonl.gz"
        ).read_bytes()


def test_a_checkpoint_whose_rollouts_are_damaged_is_replaced_by_the_one_before(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(toy_settings(tiny_model, **settings()))
    whole = tmp_path / "whole"
    stops = iter([False] * 4 + [True])
    assert not asyncio.run(run_training_async(config, whole, should_stop=lambda: next(stops)))
    for fault in ("gone", "cut", "other"):
        folder, notes = Path(shutil.copytree(whole, tmp_path / fault)), list[str]()
        file = folder / "checkpoints/step-4/rollouts.jsonl.gz"
        content = file.read_bytes()
        file.unlink()
        if fault == "cut":
            file.write_bytes(content[:100])
        if fault == "other":
            shutil.copy(folder / "checkpoints/step-2/rollouts.jsonl.gz", file)
        assert run_training(config, folder, resume=True, on_note=notes.append)
        assert any("rollouts.jsonl.gz" in note for note in notes), notes
        assert len(records(folder)) == 6


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_sampler_that_fails_meanwhile_ends_the_run_with_its_reason(make_run: MakeRun) -> None:
    run = make_run(**settings("two_copies:TwoCopies"))
    sampler: Any = run.engine.sampler
    real = sampler.sample

    async def sample(request: Any) -> Any:
        if sampler._version == 2:
            raise EngineFailedError("the sampler is gone")
        return await real(request)

    sampler.sample = sample
    with pytest.raises(EngineFailedError, match="the sampler is gone"):
        go(run)


def test_a_learner_that_fails_leaves_no_rollouts_under_way(make_run: MakeRun) -> None:
    run = make_run(**settings("two_copies:TwoCopies"))
    assert isinstance(run.engine.sampler, Copy)
    learner: Any = run.learner

    async def step(rate: float) -> Any:
        raise EngineFailedError("out of memory")

    learner.step = step

    async def begin() -> None:
        with pytest.raises(EngineFailedError, match="out of memory"):
            await train(run, Listener())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(begin())
    assert run.engine.sampler.under_way == 0


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"objective": {"importance_cap": None}}, r"training\.ahead is 1, but objective\.importance_cap is not set"),
        ({"method": "skill-grpo"}, r"method 'skill-grpo' rollouts depend .*with a skill in the prompt"),
        ({"method": "teacher-rollouts"}, r"method 'teacher-rollouts' rollouts depend .*from the teacher"),
        ({"reading": {"share": 0.34}}, r"training\.ahead is 1, but reading\.share is 0\.34"),
        ({"engine": {"name": "vllm", "sleep": True}}, r"engine\.sleep is true, but with training\.ahead=1"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model: Path, changed: dict[str, Any], words: str) -> None:
    fitting = toy_settings(tiny_model, **settings())
    check_config(RunConfig.model_validate(fitting))
    with pytest.raises(UserError, match=words):
        check_config(RunConfig.model_validate({**fitting, **changed}))
