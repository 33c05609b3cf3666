"""A server with OpenAI's chat completions API, in this process, that can be made to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SKILL = {"success_analysis": "Left first.", "mistake_analysis": "", "golden_workflow": "Left, then up."}


@dataclass(frozen=True)
class Reply:
    """The server's response to one request.

    Attributes:
        hang: seconds before the response.
        lost: number of bytes of the body that are announced but not sent.
    """

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    lost: int = 0


def completion(content: Any, *, finish: str = "stop", usage: Any = (100, 20)) -> Reply:
    """A chat completion; a dict is sent as JSON text."""
    text = json.dumps(content) if isinstance(content, dict) else content
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)} if usage else None
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Reply({"id": "x", "object": "chat.completion", "created": 0, "choices": [choice], "usage": counts})


def refusal(status: int, message: str, *, code: str | None = None, **headers: str) -> Reply:
    error = {"message": message, "type": "error", "code": code}
    return Reply({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(frozen=True)
class Request:
    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"]


class FakeEndpoint:
    """Responds with `replies` in turn, repeating the last one, or with the result of a function of the request."""

    def __init__(self, *replies: Reply, answer: Callable[[Request], Reply] | None = None) -> None:
        self.requests: list[Request] = []
        self._replies, self._answer = replies, answer
        self._lock, self._closed = threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._serve(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, *args: Any) -> None:
                pass  # clients that disconnect are expected

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        """Stop: new connections are refused, waiting ones are cut off."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        request = Request(time.monotonic(), handler.path, {k.lower(): v for k, v in handler.headers.items()}, body)
        with self._lock:
            self.requests.append(request)
            number = len(self.requests) - 1
        reply = self._answer(request) if self._answer else self._replies[min(number, len(self._replies) - 1)]
        self._closed.wait(reply.hang)
        handler.close_connection = True
        if self._closed.is_set():
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        kind = "application/json" if not data.startswith(b"<") else "text/html"
        for name, value in {"content-type": kind, "content-length": str(len(data)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[: len(data) - reply.lost])
