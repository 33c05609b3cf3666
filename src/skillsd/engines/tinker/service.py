"""The SDK of the Tinker protocol: called from a thread of its own, every call with a deadline, every failure explained.

SDK 0.25 (SkyRL's servers) and the newest one differ in a few places, which are all in this module and in `adapters`:
clients are returned as they are, or as futures; answers come as different kinds of futures.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from skillsd.engines.tinker.settings import TinkerSettings
from skillsd.errors import EngineFailedError, UserError

HOSTED = "the Tinker service"
NO_KEY = "tml-none"
"""Sent to servers that need no key: the SDK insists on one."""
BACKOFF_SECONDS = 2.0
"""Delay before a request is repeated; it doubles with each further one."""
RESUME = "The run can be resumed from its last checkpoint"

Connect = Callable[[str | None, str], tuple[Any, Any]]


class Service:
    """A connection to a server.

    Args:
        connect: (address or None, key) -> the SDK's ``ServiceClient`` and ``RestClient``.

    Raises:
        UserError: if the key is missing.
        EngineFailedError: if the server does not answer.
    """

    def __init__(self, options: TinkerSettings, connect: Connect | None = None) -> None:
        self._options = options
        self.address = options.base_url or HOSTED
        self._key = _key(options)
        self._worker = _Worker()
        opened = self.wait("a session", lambda: (connect or _connect)(options.base_url, self._key))
        self.client, self.rest = opened

    def models(self) -> Mapping[str, int | None]:
        """The server's base models, each with the most tokens that it takes, if the server states them."""
        asked = self.rest if hasattr(self.rest, "get_server_capabilities") else self.client  # SDK 0.25: the client
        found = self.wait("the list of its models", lambda: asked.get_server_capabilities())
        return {m.model_name: getattr(m, "max_context_length", None) for m in found.supported_models if m.model_name}

    def wait(self, what: str, submit: Callable[[], Any]) -> Any:
        """As `call`, but blocking: for the start."""
        try:
            with self._explaining(what):
                answer = self._worker.submit(submit).result(self._options.timeout_seconds)
                future = _future_of(answer)
                return answer if future is None else future.result(self._options.timeout_seconds)
        except _Passing as failure:
            raise failure.error from None

    async def call(self, what: str, submit: Callable[[], Any], *, repeatable: bool = False) -> Any:
        """Submit a request and wait for its answer.

        Args:
            what: the request, for messages: "an optimiser step".
            submit: called in the SDK's thread; returns the answer, or any kind of future of it.
            repeatable: submit it again if the server lost or failed it; otherwise it must not be done twice.

        Raises:
            EngineFailedError: if there is no answer within the deadline, or the server failed.
            UserError: for what the user can change: the key, the model, an expired state, a full server.
        """
        for tried in count():
            try:
                with self._explaining(what):
                    return await asyncio.wait_for(self._answer(submit), self._options.timeout_seconds)
            except _Passing as failure:
                if not repeatable or tried == self._options.max_retries:
                    raise failure.error from None
            await asyncio.sleep(BACKOFF_SECONDS * 2**tried)

    async def _answer(self, submit: Callable[[], Any]) -> Any:
        answer = await asyncio.wrap_future(self._worker.submit(submit))
        future = _future_of(answer)
        return answer if future is None else await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the session, so that the server frees its adapters. SDK 0.25 can't: the server notices a silent session.

        Closing twice is harmless.
        """
        client, self.client = self.client, None
        if client is None:
            return
        if hasattr(client, "close"):
            with suppress(Exception):  # the session ends by itself later
                self._worker.submit(lambda: client.close("success").result(10)).result(15)
        self._worker.stop()

    # -- failures -----------------------------------------------------------------------------------------------

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Raise what the SDK raises as one of our errors, without its cause, whose headers hold the key.

        A failure that may pass is raised as `_Passing` inside of `call`.
        """
        try:
            yield
        except (UserError, EngineFailedError):
            raise
        except TimeoutError:
            raise EngineFailedError(
                f"{self.address} gave no answer to the request for {what} within {self._options.timeout_seconds:g} s "
                f"(engine.timeout_seconds). {RESUME}"
            ) from None
        except Exception as error:  # of the SDK, of its HTTP client, of its own retries ...
            explained = self._explained(what, error)
            raise (_Passing(explained) if _may_pass(error) else explained) from None

    def _explained(self, what: str, error: Exception) -> UserError | EngineFailedError:
        text = " ".join(str(error).split()) or "no reason given"
        text = f"{type(error).__name__}: {text.replace(self._key, '***')[:300]}"
        failed = f"{self.address} failed at the request for {what}: {text}"
        status, lower = getattr(error, "status_code", None), text.lower()
        if status in (401, 403):
            return UserError(f"{self.address} refuses the key of ${self._options.api_key_env}. Its answer: {text}")
        if "adapter" in lower and "max" in lower:
            return UserError(
                f"{failed}. It holds as many adapters as it takes: wait until the sessions of ended runs expire there, "
                "restart it, or raise its max_lora_adapters"
            )
        if status in (404, 410) or "not found" in lower or "expired" in lower:
            return UserError(
                f"{failed}. What was requested has expired or been deleted there, or is at another server "
                "(engine.base_url)"
            )
        if status in (400, 415, 422):
            return UserError(f"{failed}. It may speak another version of the protocol: {sdk_advice(self._options)}")
        return EngineFailedError(f"{failed}. {RESUME}")


class _Passing(Exception):  # noqa: N818 (not an error of its own)
    """A failure that may pass if the request is repeated."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _future_of(answer: Any) -> Future[Any] | None:
    """The future behind what a call of the SDK returns; None if that is the answer itself."""
    if isinstance(answer, Future):
        return answer
    made = getattr(answer, "future", None)
    return made() if callable(made) else None


class _Worker:
    """A daemon thread that runs one piece of work after another.

    Not an executor: Python waits for an executor's threads when it ends, and a call of the SDK may hang.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="tinker").start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, work))
        return future

    def stop(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)


def _connect(address: str | None, key: str) -> tuple[Any, Any]:
    import tinker

    if address:
        _check_reachable(address)
    access: dict[str, Any] = {"api_key": key, **({"base_url": address} if address else {})}
    client = tinker.ServiceClient(**access)
    own = hasattr(tinker.RestClient, "get_server_capabilities") if hasattr(tinker, "RestClient") else False
    return client, tinker.RestClient(**access) if own else client.create_rest_client()


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens there: the SDK would try for five minutes without a word."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {address} (engine.base_url): {error}. Start the server, or correct the address"
        ) from None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: the server lost or failed it, rather than refused it."""
    status = getattr(error, "status_code", None)
    if status is not None:
        return status in (408, 409, 410, 429) or status >= 500
    if category := getattr(error, "category", None):  # of a request that the server took and then failed
        return str(getattr(category, "value", category)).lower() != "user"
    return type(error).__name__ in ("RetryableException", "APIConnectionError", "APITimeoutError")


def _key(options: TinkerSettings) -> str:
    name = options.api_key_env
    key = os.environ.get(name, "").strip()
    if not key and options.server == "tinker":
        raise UserError(
            f"the environment variable {name!r} holds no key for {options.base_url or HOSTED}: set it, or name another "
            "one in engine.api_key_env. (For SkyRL's server, which needs none: engine.server=skyrl.)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the environment variable {name!r} does not hold a key: its value has spaces or other odd characters"
        )
    return key or NO_KEY


def installed() -> str | None:
    """The version of the package ``tinker``; None if it is missing."""
    try:
        return version("tinker")
    except PackageNotFoundError:
        return None


def sdk_advice(options: TinkerSettings) -> str:
    """Which version of the SDK each server needs, and which one is installed."""
    return (
        f"SkyRL 0.4.0's server (engine.server=skyrl, skyrl-jax) needs the package tinker 0.25.*, the hosted service "
        f"(engine.server=tinker) the newest; installed is {installed()}, and engine.server is {options.server}"
    )


def check_sdk(options: TinkerSettings) -> None:
    """Raise UserError if the package ``tinker`` is missing, or not of the version that the server needs."""
    needed = options.traits.sdk
    package = f"tinker=={needed}*" if needed else "tinker"
    found = installed()
    if found is None:
        raise UserError(f"engine.name=tinker needs a package: pip install '{package}' ({sdk_advice(options)})")
    if not found.startswith(needed):
        raise UserError(
            f"this server needs another version of the SDK: pip install '{package}' ({sdk_advice(options)})"
        )
