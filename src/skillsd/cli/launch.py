"""`skillsd train --gpus N`: start the ranks by torchrun, and again after one of them has died."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Sequence
from typing import Any

from skillsd.config import RunConfig
from skillsd.engines.torch.ranks import launched
from skillsd.errors import EngineFailedError, RanksLostError, UserError
from skillsd.runs.checks import check_config, check_ranks


def launch(config: RunConfig, arguments: Sequence[str], ranks: int, restarts: int) -> int:
    """Run `skillsd train` in several ranks; returns the exit code.

    A rank that dies (killed, out of memory, a fault in a library) or hangs is a reason to start all of them again, from
    the last checkpoint; an error that would come again is not.

    Args:
        arguments: of `skillsd train`.
        restarts: the most.

    Raises:
        UserError: for what can be refused before anything is started.
        EngineFailedError: if a rank has died after the last restart.
    """
    if launched.size() > 1:
        raise UserError("--gpus starts ranks, but this process was started by torchrun already: leave one of them out")
    if ranks < 2:
        raise UserError(f"--gpus is {ranks}: expected 2 or more. Leave it out to train in one process")
    check_config(config)
    check_ranks(config, ranks)
    agent = _Agent(["skillsd", "train", *arguments], ranks, restarts)
    previous = {number: signal.signal(number, _pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        agent.start()
        while agent.is_alive():  # in short waits: signals are handled between them
            agent.join(0.2)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if agent.failure is not None:
        raise agent.failure
    return agent.code


class _Agent(threading.Thread):
    """torchrun's agent. In a thread, where it leaves signals to this process: it would end the ranks at once."""

    def __init__(self, argv: Sequence[str], ranks: int, restarts: int) -> None:
        super().__init__(name="torchrun", daemon=True)
        self._argv, self._ranks, self._restarts = list(argv), ranks, restarts
        self.code = 1
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.code = self._run()
        except BaseException as error:
            self.failure = error

    def _run(self) -> int:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher import LaunchConfig, elastic_launch

        logging.disable(logging.CRITICAL)  # of torchrun: what failed is written by the ranks, and below
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._ranks)))
        with tempfile.TemporaryDirectory(prefix="skillsd-torchrun-") as folder:
            options = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=self._ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=self._restarts,
                start_method="spawn",
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            try:
                codes = elastic_launch(options, run_rank)(self._argv)
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                raise EngineFailedError(
                    f"rank {rank} ended with {_ending(failure.exitcode)}; the ranks have been started again "
                    f"{self._restarts} times, as often as --max-restarts allows. Nothing up to the last checkpoint is "
                    "lost: go on with --resume"
                ) from error
        return int(codes[0])


def run_rank(argv: list[str]) -> int:
    """One rank: the command line, in a process of its own; returns the exit code.

    Only an ending that another start may avoid is one of the process itself, for which torchrun starts all ranks again.
    """
    os.setpgrp()  # Ctrl-C reaches the ranks once, through the process that started them
    sys.argv = argv
    code: Any = 0
    try:
        runpy.run_module("skillsd", run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    if code == RanksLostError.EXIT_CODE:
        sys.stdout.flush()
        os._exit(code)
    return int(code)


def _pass_on(number: int, frame: Any) -> None:
    """Pass a signal on to the ranks, where rank 0 handles it."""
    for process in multiprocessing.active_children():
        if process.pid is not None:
            os.kill(process.pid, number)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
