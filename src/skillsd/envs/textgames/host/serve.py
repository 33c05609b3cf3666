"""Serves an engine's games on a Unix socket. Run by the engine's own Python: ``python serve.py ENGINE SOCKET``.

ENGINE is a module of this folder. Each connection gets a game of its own. Requests are handled one after another, since
the games of one virtual machine share its state. `skillsd.envs.hosts` describes the protocol.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO


def main() -> None:
    name, address = sys.argv[1:]
    threading.Thread(target=_end_with_the_trainer, args=[Path(address).parent], daemon=True).start()
    engine = importlib.import_module(name).Engine()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(1024)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                game = (engine.game(), connection.makefile("rwb"), connection)
                selector.register(connection, selectors.EVENT_READ, game)
            elif not _answer(*key.data[:2]):
                selector.unregister(key.fileobj)
                for file in key.data[1:]:
                    with contextlib.suppress(ConnectionError):  # an answer that was not sent
                        file.close()


def _end_with_the_trainer(folder: Path) -> None:
    """Kill this process and its virtual machine when standard input ends: also while a request is handled.

    Args:
        folder: the socket's, which is removed, in case the trainer was killed.
    """
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(game: Any, wire: BinaryIO) -> bool:
    """Handle one request. Returns False if the connection is closed."""
    try:
        line = wire.readline()
        if not line:
            return False
        request = json.loads(line)
        try:
            answer = {"ok": getattr(game, request.pop("op"))(**request)}
        except Exception as error:  # a fault of the engine
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        wire.write(json.dumps(answer).encode() + b"\n")
        wire.flush()
    except ConnectionError:
        return False
    return True


if __name__ == "__main__":
    main()
