"""What this package does on one GPU, beside what the card allows. Five minutes, one process, no downloads.

    PYTHONPATH=src python3 benchmarks/gpu.py [--json FILE] [--quick] [--only PART ...] [--toy]

Models of real sizes are made on the spot with random weights. The card's ceilings (bf16 matrix products, device copy,
launches) are measured first; targets are ratios to them. A part that fails is recorded, and the others go on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import gpu_models  # noqa: E402
import gpu_parts  # noqa: E402
import torch  # noqa: E402
from gpu_models import Made  # noqa: E402


class Bench:
    """What all parts share: device, ceilings, clock and results.

    Attributes:
        peak: of bf16 matrix products, in operations per second.
        bandwidth: of a device copy, in bytes read and written per second.
    """

    peak = bandwidth = 1.0

    def __init__(self, device: torch.device, folder: Path, *, seconds: float, quick: bool, toy: bool) -> None:
        self.device, self.quick, self.toy = device, quick, toy
        self.results: dict[str, Any] = {"machine": _machine(device), "quick": quick, "toy": toy, "parts": {}}
        self._folder, self._seconds = folder, seconds
        self._made: dict[str, Made] = {}
        self._deadline = seconds
        self._part: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds left to this part."""
        return self._deadline - (time.perf_counter() - BEGIN)

    def say(self, text: str) -> None:
        now = time.perf_counter() - BEGIN
        print(f"[{now:5.0f} s, {max(0.0, self._seconds - now):4.0f} s left] {text}", flush=True)

    def row(self, name: str, value: float, unit: str, *, most: float | None = None, least: float | None = None,
            note: str = "") -> None:  # fmt: skip
        """Record a value and, with a target, whether it is met."""
        met = None if most is None and least is None else (most is None or value <= most) and (
            least is None or value >= least
        )  # fmt: skip
        if self.toy:
            met = None
        row = {"name": name, "value": value, "unit": unit, "most": most, "least": least, "met": met, "note": note}
        self._part["rows"].append(row)
        self.say(f"  {_line(row)}")

    def model(self, name: str) -> Made:
        if name not in self._made:
            self._made[name] = gpu_models.write(name, self._folder / name, toy=self.toy)
        return self._made[name]

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> int:
        """Free bytes on the device."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 1 << 40

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def measure(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """Run a part; what goes wrong in it is recorded."""
        begin = time.perf_counter()
        self._part = self.results["parts"][name] = {"rows": []}
        self._deadline = min(self._seconds, begin - BEGIN + seconds)
        self.say(name)
        try:
            with _alarm(max(1.0, min(1.5 * seconds, self._seconds - (begin - BEGIN)))):
                work()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (str(error).strip() or repr(error)).splitlines()[0][:300]
            self._part["error"] = f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
            self._part["traceback"] = traceback.format_exc()[-6000:]
            self.say(f"  FAILED {self._part['error']}")
        self._part["seconds"] = time.perf_counter() - begin
        gpu_models.free(self.device)

    def ceilings(self) -> None:
        """What this device can do at best."""
        n, count = (256, 1 << 18) if self.toy else (8192, 1 << 30)
        dtype = torch.bfloat16
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        self.peak = 2 * n**3 / self._fastest(lambda: a @ b)
        self.row("bf16 matrix product", self.peak / 1e12, "TFLOP/s")
        source = torch.empty(count, device=self.device, dtype=dtype)
        target = torch.empty_like(source)
        self.bandwidth = 2 * 2 * count / self._fastest(lambda: target.copy_(source))
        self.row("device copy, read and written", self.bandwidth / 1e12, "TB/s")
        x = torch.zeros(8, device=self.device)
        self.row("a small operation", 1e6 * self._fastest(lambda: x.add_(1), times=300), "us")
        self.row("a number read by the host", 1e6 * self._fastest(lambda: x[0].item(), times=100), "us")

    def _fastest(self, work: Callable[[], Any], times: int = 10) -> float:
        """Seconds of one call, the best of three series."""
        work()
        series = []
        for _ in range(3):
            self.sync()
            begin = time.perf_counter()
            for _ in range(times):
                work()
            self.sync()
            series.append((time.perf_counter() - begin) / times)
        return min(series)


class _alarm:  # noqa: N801 (a context manager)
    """Raises TimeoutError in the main thread after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def late(*_: Any) -> None:
            raise TimeoutError(f"not done after {self.seconds:.0f} s")

        self.before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def _machine(device: torch.device) -> dict[str, Any]:
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"device": torch.cuda.get_device_name(device), "free_gib": free / 2**30, "total_gib": total / 2**30}
    return found


def _line(row: dict[str, Any]) -> str:
    target = "" if row["met"] is None else f"target {'<=' if row['least'] is None else '>='} " + _number(
        row["most"] if row["least"] is None else row["least"]
    )  # fmt: skip
    verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
    return (
        f"{row['name']:58} {_number(row['value']):>10} {row['unit']:9} {target:16} {verdict:6} {row['note']}".rstrip()
    )


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def show(results: dict[str, Any]) -> None:
    """The table at the end."""
    print(f"\n{', '.join(f'{key} {value}' for key, value in results['machine'].items())}\n")
    for name, part in results["parts"].items():
        print(f"{name} ({part.get('seconds', 0):.0f} s)")
        for row in part["rows"]:
            print(f"  {_line(row)}")
        if "error" in part:
            print(f"  FAILED {part['error']}")
    verdicts = [row["met"] for part in results["parts"].values() for row in part["rows"] if row["met"] is not None]
    failed = sum("error" in part for part in results["parts"].values())
    print(f"\n{sum(verdicts)} of {len(verdicts)} targets met, {failed} parts failed", flush=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here, after each part")
    parser.add_argument("--quick", action="store_true", help="a minute: shorter measurements, a fifth of the time each")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--toy", action="store_true", help="tiny models, also on a CPU: does it run?")
    parser.add_argument("--seconds", type=float, help="time for everything; 300, or 60 with --quick")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.toy else "cpu")
    if device.type == "cpu" and not options.toy:
        parser.error("there is no GPU here; --toy runs tiny models on the CPU")
    seconds = options.seconds or (60.0 if options.quick else 300.0)
    if options.toy:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, Path(folder), seconds=seconds, quick=options.quick, toy=options.toy)
        parts = gpu_parts.parts(bench, asyncio.run)
        if unknown := set(options.only or ()) - set(parts):
            parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        chosen = {name: part for name, part in parts.items() if not options.only or name in options.only}
        bench.measure("ceilings", 10, bench.ceilings)
        share = min(1.0, (seconds - 15) / sum(part[0] for part in chosen.values())) if options.quick else 1.0
        for name, (most, work) in chosen.items():
            if time.perf_counter() - BEGIN > seconds - 3:
                bench.results["parts"][name] = {"rows": [], "error": "no time left"}
                continue
            bench.measure(name, max(most * share, 5), work)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(bench.results, indent=1) + "\n", encoding="utf-8")
    show(bench.results)
    return bench.results


if __name__ == "__main__":
    main(sys.argv[1:])
