"""Capture of steps with a recorder in place of CUDA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from engines.schedules import play, run
from skillsd.engines.torch.engine import TorchEngine
from skillsd.engines.torch.graphs import GraphedSteps, Step
from skillsd.engines.torch.static_steps import StaticSteps


class Recorder:
    """Replays by running the step, and counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.captured = self.replayed = self.made = 0
        self.error = error

    def new(self) -> Callable[[Step], Step]:
        self.made += 1
        return self.capture

    def capture(self, step: Step) -> Step:
        if self.error is not None:
            raise self.error
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


def test_the_first_use_runs_directly_the_second_is_captured_and_replayed() -> None:
    recorder, done = Recorder(), []
    graphs = GraphedSteps(recorder.new)
    for _ in range(4):
        graphs.run("kind", "a", lambda: done.append("a"))
    assert done == ["a"] * 4  # a capture alone does nothing
    assert (recorder.captured, recorder.replayed, recorder.made) == (1, 3, 1)


def test_the_least_recently_used_graph_is_dropped() -> None:
    recorder = Recorder()
    graphs = GraphedSteps(recorder.new, most=2)
    for key in ("a", "b", "a", "b", "a", "c", "c"):  # b is the oldest when c is captured
        graphs.run("kind", key, lambda: None)
    assert recorder.captured == 3
    graphs.run("kind", "a", lambda: None)
    assert recorder.captured == 3
    graphs.run("kind", "b", lambda: None)  # warm already, so captured at once
    assert recorder.captured == 4


def test_cleared_graphs_are_captured_again_at_once_in_new_memory() -> None:
    recorder = Recorder()
    graphs = GraphedSteps(recorder.new)
    for _ in range(2):
        graphs.run("kind", "a", lambda: None)
    graphs.clear()
    graphs.run("kind", "a", lambda: None)
    assert (recorder.captured, recorder.replayed, recorder.made) == (2, 2, 2)


def test_after_a_failed_capture_all_steps_run_directly_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorder, done = Recorder(RuntimeError("operation not permitted when stream is capturing\nsecond line")), []
    graphs = GraphedSteps(recorder.new)
    with caplog.at_level(logging.WARNING):
        for key in "aaabbb":
            graphs.run("kind", key, lambda key=key: done.append(key))  # type: ignore[misc]
    assert done == list("aaabbb")
    assert graphs.failed
    assert recorder.made == 1  # never tried again
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing)" in record.message
    assert "engine.decode" in record.message


def test_an_error_of_the_step_itself_is_raised() -> None:
    graphs = GraphedSteps(Recorder().new)

    def fails() -> None:
        raise ValueError("of the step")

    with pytest.raises(ValueError, match="of the step"):
        graphs.run("kind", "a", fails)


ONES = torch.ones(3)

WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: ONES.sum().item(),
    "bool": lambda: bool((ONES > 0).all()),
    "nonzero": (ONES > 0).nonzero,
    "index by mask": lambda: ONES[ONES > 0],
    "assignment by mask": lambda: ONES.clone().__setitem__(ONES > 0, torch.ones(3)),
    "masked_select": lambda: ONES.masked_select(ONES > 0),
    "one argument of where": lambda: torch.where(ONES > 0),
    "unique": ONES.unique,
    "repeat_interleave": lambda: torch.repeat_interleave(ONES.long()),
    "another device": lambda: ONES.to("meta"),
    "a scalar from another device": lambda: torch.ones(()).to("meta"),
    "written to another device": lambda: ONES.clone().copy_(torch.ones(3, device="meta")),
}


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("inference", [True, False])
def test_steps_that_wait_for_the_device_are_found_before_a_capture(
    name: str, inference: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, done = Recorder(), []
    graphs = GraphedSteps(recorder.new)

    def step() -> None:
        with torch.inference_mode(inference):
            if name != "written to another device" or not graphs.failed:
                WAITING[name]()
            done.append(name)

    for _ in range(3):
        graphs.run("kind", "a", step)
    assert len(done) == 3
    assert graphs.failed
    assert recorder.made == 0
    (record,) = caplog.records
    assert "waits for the device" in record.message


def test_each_kind_is_checked_once() -> None:
    """The check takes as long as some steps; a model does the same for every shape."""
    graphs, modes = GraphedSteps(Recorder().new), []
    for kind, shape in (("decode", 1), ("decode", 2), ("prefill", 1), ("prefill", 3)):
        graphs.run(kind, shape, lambda: modes.append(len(_get_current_dispatch_mode_stack())))
    assert modes == [1, 0, 1, 0]


def test_ordinary_operations_do_not_wait() -> None:
    graphs = GraphedSteps(Recorder().new)

    def step() -> None:
        with torch.inference_mode():
            x = torch.nn.functional.scaled_dot_product_attention(*[torch.randn(1, 2, 3, 4)] * 3)
            x[:, :, torch.tensor([0, 1])] = x[:, :, torch.tensor([1, 2])] * torch.tensor(2.0)
            torch.where(x > 0, x, 1.0).to(torch.float64).cumsum(-1).masked_fill_(x > 0, 0.0)

    graphs.run("kind", "a", step)
    assert not graphs.failed


def _with(recorder: Recorder, engine: TorchEngine, **options: int) -> StaticSteps:
    engine.decoders["student"] = engine._decoder("student", "static", 64)
    steps = engine.decoders["student"].steps
    assert isinstance(steps, StaticSteps)
    steps._graphs = GraphedSteps(recorder.new)
    steps._kept_bytes = options.get("kept_bytes", 0)
    return steps


def test_graphs_end_with_the_memory_that_they_use(model_folder: Callable[[str], Path]) -> None:
    """The decoder with a recorder samples what it samples without; graphs are dropped when the pool moves or ends."""
    engine = TorchEngine(str(model_folder("llama")), device="cpu", decode="static")
    expected = run(play(engine, episodes=6))
    for kept_bytes, again in ((0, True), (1 << 30, False)):
        recorder = Recorder()
        steps = _with(recorder, engine, kept_bytes=kept_bytes)
        assert run(play(engine, episodes=6)) == expected
        assert recorder.replayed > recorder.captured > 2
        before, pool = recorder.captured, steps.pool
        engine._release()
        assert (steps.pool is not pool) == again
        assert run(play(engine, episodes=6)) == expected
        assert recorder.made >= 1 + again
        if not again:  # nothing has moved, so everything that was captured is used again
            assert len(steps._graphs._graphs) >= before  # type: ignore[union-attr]
