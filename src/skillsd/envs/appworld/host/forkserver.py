"""Worlds by the dozen: AppWorld is imported once, then every episode is a fork. Run by AppWorld's own Python.

``python forkserver.py OPTIONS`` listens on a Unix socket (nobody but its owner can reach it, unlike a port on
loopback); each connection gets a fresh process with a world of its own, which ends with the connection. So no world can
leak into the next, and a hung one is killed without anyone noticing. The server itself ends when its standard input
does, that is when the trainer is gone, however it went; or when the server of jails does.
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
    jails = Jails(options)  # imports what it needs while we do
    world.preload(Path(options["root"]))
    options = jails.strongest()
    print("ready", flush=True)
    children: set[int] = set()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
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
                except OSError as error:  # no room for one more: whoever asked is told by the connection's end
                    print(f"no fork: {error}", file=sys.stderr, flush=True)
                    connection.close()
                    continue
                if child == 0:
                    listener.close()
                    _be_a_world(connection, options)
                children.add(child)
                connection.close()
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        jails.process.kill()
        shutil.rmtree(Path(options["socket"]).parent, ignore_errors=True)  # a trainer that was killed can't


def _reap(children: set[int], options: dict[str, Any]) -> None:
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0] == child:
            children.discard(child)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # whatever is left of its group; its jail goes by itself
            for left in (world.outputs(options, child), *Path(options["socket"]).parent.glob(f"jail-{child}-*")):
                shutil.rmtree(left, ignore_errors=True)


def _be_a_world(connection: socket.socket, options: dict[str, Any]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)  # the engine prints; errors go on to standard error, the server's log
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
