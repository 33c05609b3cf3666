"""`benchmarks/gpu.py` runs, with tiny models on the CPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("gpu", "gpu_parts", "gpu_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu

    return gpu


def test_every_part_runs(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu.main(["--toy", "--seconds", "3000", "--json", str(tmp_path / "results" / "gpu.json")])
    shown = capsys.readouterr().out
    assert "0 parts failed" in shown
    assert {name: part["error"] for name, part in results["parts"].items() if "error" in part} == {}
    parts = {"ceilings", "decode", "prefill", "sokoban", "gap", "equality", "learn-135m", "learn-1.7b", "decode-4b"}
    assert set(results["parts"]) == parts
    assert json.loads((tmp_path / "results" / "gpu.json").read_text()) == results
    for part in results["parts"].values():
        for row in part["rows"]:
            assert math.isfinite(row["value"]), row


def test_a_part_that_fails_is_recorded(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parts(bench: Any, run: Any) -> dict[str, Any]:
        def fail() -> None:
            bench.row("before", 1.0, "ms", most=2.0)
            raise RuntimeError("CUDA error\nand more")

        return {"first": (5, fail), "second": (5, lambda: bench.row("after", 2.0, "ms"))}

    monkeypatch.setattr(gpu.gpu_parts, "parts", parts)
    results = gpu.main(["--toy", "--seconds", "3000", "--json", str(tmp_path / "gpu.json")])
    assert results["parts"]["first"]["error"].startswith("RuntimeError: CUDA error (test_gpu_benchmark.py:")
    assert [row["value"] for row in results["parts"]["second"]["rows"]] == [2.0]
    assert "1 parts failed" in capsys.readouterr().out


def test_unknown_parts_are_refused(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--toy", "--only", "decode", "speed"])
    assert "no part speed; there are decode, prefill" in capsys.readouterr().err


def test_arithmetic_of_shared_prompts(gpu: Any, tmp_path: Path) -> None:
    """Each distinct token once; queries of the own part against keys of the prompt, too."""
    made = gpu.gpu_models.write("SmolLM2-135M", tmp_path, toy=True)
    alone = made.flops([10, 10], [0, 0], 0)
    shared = made.flops([10, 10], [0, 6], 0)
    assert alone - shared == 6 * 2 * made.sizes.matrices + 4 * made.sizes.layers * 32 * 21
    assert made.flops([10], [0], 4) - made.flops([10], [0], 0) == 4 * 2 * made.sizes.head
