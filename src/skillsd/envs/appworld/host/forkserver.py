"""The world server: imports AppWorld once, then forks a process per episode. Run by AppWorld's Python.

``python forkserver.py OPTIONS`` listens on a Unix socket (unlike a loopback port, only its owner can connect). Each
connection gets a new process with its own world, which ends with the connection. So worlds share no state, and a hung
one can be killed without affecting others. The server ends when its standard input is closed, i.e. when the trainer has
ended for whatever reason, or when the jail server has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import world
from jails import Jails


def main() -> None:
    options = json.loads(sys.argv[1])
    os.environ["APPWORLD_ROOT"] = options["root"]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(options["socket"])
    listener.listen(1024)
    jails = Jails(options)  # its imports run in parallel with ours
    world.preload(Path(options["root"]))
    options = jails.strongest()
    print("ready", flush=True)
    children: set[int] = set()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    try:
        while True:
            ready, _, _ = select.select([listener, sys.stdin, wake], [], [])
            if sys.stdin in ready and not os.read(sys.stdin.fileno(), 1 << 10):
                break
            if wake in ready:
                os.read(wake, 1 << 10)
                _reap(children, options)
                if jails.process.poll() is not None:
                    break  # the trainer starts another server
            if listener in ready:
                connection, _ = listener.accept()
                try:
                    child = os.fork()
                except OSError as error:  # out of processes or memory: the client sees the connection close
                    print(f"fork failed: {error}", file=sys.stderr, flush=True)
                    connection.close()
                    continue
                if child == 0:
                    listener.close()
                    _run_world(connection, options)
                children.add(child)
                connection.close()
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        jails.process.kill()
        shutil.rmtree(Path(options["socket"]).parent, ignore_errors=True)  # in case the trainer was killed


def _reap(children: set[int], options: dict[str, Any]) -> None:
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0] == child:
            children.discard(child)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # the rest of its group; its jail ends by itself
            folder = Path(options["socket"]).parent
            for remains in (world.outputs(options, child), *folder.glob(f"jail-{child}-*")):
                shutil.rmtree(remains, ignore_errors=True)


def _run_world(connection: socket.socket, options: dict[str, Any]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)  # discard what the engine prints; standard error still goes to the server's log
        resource.setrlimit(resource.RLIMIT_AS, (options["world_bytes"], options["world_bytes"]))
        world.serve(connection, options)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
