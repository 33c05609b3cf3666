"""The client of the vLLM worker process: starts it, sends requests, detects its end. Imports neither vLLM nor torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

from skillsd.errors import EngineFailedError, SamplerLostError, UserError

WORKER = Path(__file__).with_name("worker.py")

TESTED = "0.32.0"
"""The version of vLLM that this package is written for."""


class WorkerClient:
    """A worker process and its pending answers. May be used from any thread.

    Args:
        python: the interpreter that has vLLM.
        options: keyword arguments of ``vllm.LLM``.
        environment: all environment variables of the process.
        worker: the script (tests use another).

    Raises:
        UserError: if `python` can't be run.
    """

    def __init__(
        self, python: str, options: Mapping[str, Any], environment: Mapping[str, str], worker: Path = WORKER
    ) -> None:
        self._python = python
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, str(worker)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=dict(environment),
                text=True, encoding="utf-8",
                start_new_session=True,  # so that Ctrl-C does not reach it: the iteration is finished first
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"engine.python is {python!r}, which can't be run ({error.strerror}): give the path of an interpreter "
                "that has vLLM, e.g. build/vllm/bin/python after `make vllm-env`"
            ) from error
        self._lock = threading.Lock()
        self._due: dict[int, Future[dict[str, Any]]] = {}
        self._number = 0
        self._ended: str | None = None  # why there are no more answers
        self.ready: Future[dict[str, Any]] = Future()
        """``ready``: vLLM's version, and ``gpus``: the ids of its GPUs, once it accepts requests."""
        self._reader = threading.Thread(target=self._read, daemon=True, name="vllm worker")
        self._reader.start()
        with contextlib.suppress(OSError):  # if the process has ended, the reader thread reports why
            self._write(dict(options))

    def ask(self, message: Mapping[str, Any]) -> tuple[int, Future[dict[str, Any]]]:
        """Send a request; returns its number and its future answer, a `SamplerLostError` if there will be none."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._ended is not None:
                raise SamplerLostError(self._ended)
            self._number += 1
            number = self._number
            self._due[number] = future
            with contextlib.suppress(OSError):
                self._write({"id": number, **message})
        return number, future

    def abort(self, number: int) -> None:
        """Cancel a request, if it is still pending."""
        with self._lock:
            pending = self._due.pop(number, None) is not None
        if pending:
            self.tell({"abort": number})

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send what has no answer."""
        with self._lock, contextlib.suppress(OSError):
            if self._ended is None:
                self._write(message)

    def close(self) -> None:
        """End the process. Pending requests fail."""
        with self._lock:
            self._ended = self._ended or "the vLLM worker was closed"
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log_tail(self, lines: int = 12) -> str:
        """The end of vLLM's log."""
        log = self._log.fileno()  # read with pread: the worker shares its file position
        text = os.pread(log, 8000, max(0, os.fstat(log).st_size - 8000))
        return "\n".join(text.decode(errors="replace").splitlines()[-lines:])

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        fatal = None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "ready" in answer:
                self.ready.set_result(answer)
                continue
            if "lacks" in answer:
                self._ended = self._outdated(**answer)
                continue
            if "fatal" in answer:
                fatal = answer["fatal"]
                continue
            with self._lock:
                future = self._due.pop(answer["id"], None)
            if future is None or not future.set_running_or_notify_cancel():
                continue
            if "error" in answer:
                future.set_exception(EngineFailedError(f"vLLM refused a request: {answer['error']}"))
            else:
                future.set_result(answer)
        code = self._process.wait()
        with self._lock:
            self._ended = self._ended or self._explain(code, fatal)
            due, self._due = self._due, {}
        pending: list[Future[Any]] = [*due.values(), self.ready]
        for future in pending:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(SamplerLostError(self._ended))

    def _outdated(self, lacks: str, version: str) -> str:
        return (
            f"vLLM {version} ({self._python!r}, engine.python) has no {lacks}: install vLLM {TESTED} or later there "
            "(e.g. by `make vllm-env`), or set engine.weights=file and engine.sleep=false"
        )

    def _explain(self, code: int, fatal: str | None) -> str:
        if fatal is not None and "No module named 'vllm'" in fatal:
            return (
                f"the interpreter {self._python!r} (engine.python) has no vLLM. Run `make vllm-env`, which installs "
                "vLLM in build/vllm, and set engine.python=build/vllm/bin/python"
            )
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        why = f": {fatal}" if fatal else ""
        return f"the vLLM worker ({self._python!r}) {ended}{why}. The end of its log:\n{self.log_tail()}"
