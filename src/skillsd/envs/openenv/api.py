"""The HTTP side of an OpenEnv server: the schema of its actions, its splits and its tasks."""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from skillsd.envs import values
from skillsd.errors import UserError

SECONDS = 30.0
"""Deadline of a request."""

MAX_BYTES = 256 << 20
"""Longest answer that is read."""


class Api:
    """The server at `url`, e.g. ``http://127.0.0.1:8000``.

    Raises:
        UserError: if that is no URL of a server.
    """

    def __init__(self, url: object) -> None:
        parts = urlsplit(url.rstrip("/") if isinstance(url, str) else "")
        if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname or parts.query:
            raise UserError(
                f"environment.options.url is {url!r}: expected the address of an OpenEnv server, e.g. "
                "http://127.0.0.1:8000"
            )
        secure = parts.scheme in ("https", "wss")
        self.url = urlunsplit(parts._replace(scheme="https" if secure else "http"))
        self.socket = urlunsplit(parts._replace(scheme="wss" if secure else "ws", path=f"{parts.path}/ws"))

    def schema(self) -> Mapping[str, Any]:
        """The JSON schemas of the server's actions and observations."""
        found = self._ask("/schema")
        if not isinstance(found, dict) or not isinstance(found.get("action"), dict):
            raise UserError(f"{self.url} is no OpenEnv server: /schema has no schema of its actions")
        return found

    def environments(self) -> list[str]:
        """The names of the environments; empty if the server does not say."""
        found = self._ask("/list_environments")
        return [str(name) for name in found] if isinstance(found, list) else []

    def splits(self, env: str) -> list[str]:
        """The names of an environment's splits; empty if it lists no tasks."""
        found = self._ask(f"/{quote(env, safe='')}/splits") or []
        names = [split.get("name") if isinstance(split, dict) else split for split in self._list(found, "splits")]
        return [str(name) for name in names]

    def tasks(self, env: str, split: str) -> list[Any]:
        """What the server says of each task of a split: any JSON, usually with an ``id`` and an ``index``.

        Of very large splits, servers may list the first tasks only. The others are then known by their number.
        """
        place = f"/{quote(env, safe='')}"
        found = self._ask(f"{place}/tasks", {"split": split})
        if not isinstance(found, dict):
            raise UserError(f"the server {self.url} lists no tasks of the split {split!r}")
        listed = list(self._list(found.get("tasks"), "tasks"))
        counted = self._ask(f"{place}/num_tasks", {"split": split})
        number = counted.get("num_tasks") if isinstance(counted, dict) else None
        more = range(len(listed), number) if isinstance(number, int) else ()
        return listed + [{"index": index} for index in more]

    def tools(self) -> Sequence[Any]:
        """What the server says of each tool of an environment of tools (MCP); empty if it has none."""
        found = self._ask("/mcp", {"jsonrpc": "2.0", "method": "tools/list", "params": {}, "id": 1})
        result = found.get("result") if isinstance(found, dict) else None
        return self._list(result.get("tools"), "tools") if isinstance(result, dict) else []

    def _list(self, found: Any, what: str) -> Sequence[Any]:
        if not isinstance(found, list):
            raise UserError(f"{self.url} answered with {str(found)[:80]!r}: expected a list of {what}")
        return found

    def _ask(self, path: str, data: Mapping[str, Any] | None = None) -> Any:
        """The answer to a GET, or to a POST of `data`; None if the server has no such thing.

        Raises:
            UserError: if the server can't be reached or fails.
        """
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with _opener(self.url).open(request, timeout=SECONDS) as answer:
                return values.valid_unicode(json.loads(answer.read(MAX_BYTES)))
        except urllib.error.HTTPError as error:
            if error.code in (404, 405, 501):
                return None
            said = error.read(500).decode("utf-8", "replace").strip()
            raise UserError(f"the OpenEnv server failed at {self.url}{path}: HTTP {error.code} {said}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"no OpenEnv server answers at {self.url}: {reason}. Start it, or correct environment.options.url"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.url}{path} did not answer with JSON: is it an OpenEnv server?") from error


def is_local(url: str) -> bool:
    """Whether a URL is of this machine, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _opener(url: str) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local(url) else []))
