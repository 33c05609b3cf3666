"""The worker process of `VllmSampler`, run by an interpreter that has vLLM. It imports nothing else.

It speaks JSON lines: on stdin vLLM's options, then requests; on stdout ``ready``, then answers. vLLM's own output goes
to stderr. Requests for samples are read between decoding steps, so they join and leave the batch at any time. Other
requests wait until all earlier ones have finished, and later ones wait for them. New weights come in a folder
(``weights``) or in GPU memory (``start``, ``chunk`` ..., ``finish``, ``resume``). From ``sleep`` or the beginning of an
update to its end, nothing is sampled: the weights are incomplete. The process ends when stdin is closed.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import queue
import shutil
import sys
import threading
from typing import Any

Message = dict[str, Any]

TRANSFER = "weight_transfer_config"
"""The option that turns on weights in GPU memory."""

CALLS = {
    TRANSFER: ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"),
    "enable_sleep_mode": ("sleep", "wake_up"),
}
"""Option -> the methods of ``vllm.LLM`` that it needs."""


def main() -> None:
    sys.path.pop(0)  # this folder, whose modules (e.g. options.py) could shadow others
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    inbox: queue.Queue[Message] = queue.Queue()
    options = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(inbox, options["model"]), daemon=True).start()

    def answer(message: Message) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        # Run vLLM's engine in this process: it leaves no other process behind, and a step is a function call.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm
        from vllm.platforms import current_platform

        needed = [name for option, names in CALLS.items() if options.get(option) for name in names]
        for name in needed:
            if not hasattr(vllm.LLM, name):
                answer({"lacks": f"LLM.{name}", "version": vllm.__version__})
                return
        if current_platform.is_cpu():
            options.setdefault("enforce_eager", True)  # compiling takes minutes and decodes no faster
            # With chunked prefill vLLM rewinds a request's random generator, which fails on a CPU ("CPU Generator does
            # not use offset").
            options.setdefault("enable_chunked_prefill", False)
            options.setdefault("max_num_batched_tokens", max(4096, options["max_model_len"]))
        llm = vllm.LLM(**options)
        gpus = []
        if TRANSFER in options:
            llm.init_weight_transfer_engine({"init_info": {"packed": True}})
            gpus = llm.collective_rpc(_gpu)
    except BaseException as error:
        answer({"fatal": f"{type(error).__name__}: {error}"})
        raise
    answer({"ready": vllm.__version__, "gpus": gpus})
    Worker(llm, vllm, inbox, answer).serve()


def _listen(inbox: queue.Queue[Message], folder: str) -> None:
    for line in sys.stdin:
        inbox.put(json.loads(line))
    shutil.rmtree(folder, ignore_errors=True)  # the parent may have been killed before it could
    os._exit(0)  # even in the middle of a step: no one reads the answer


def _gpu(worker: Any) -> str:
    """The id of the GPU of one of vLLM's own workers; runs there."""
    import torch

    return str(torch.cuda.get_device_properties(worker.device.index).uuid)


class Worker:
    """Alternates between reading requests and stepping the engine."""

    def __init__(self, llm: Any, vllm: Any, inbox: queue.Queue[Message], answer: Any) -> None:
        self._llm, self._vllm, self._inbox, self._answer = llm, vllm, inbox, answer
        self._engine = llm.llm_engine
        self._held: Message | None = None  # waits for earlier requests
        self._sessions: dict[str, list[int]] = {}  # each one's tokens, so that only new ones are sent
        self._session_of: dict[str, str] = {}  # of the requests under way
        self._complete, self._asleep = True, False

    def serve(self) -> None:
        while True:
            busy = self._engine.has_unfinished_requests()
            if self._held is not None and not busy:
                message, self._held = self._held, None
                self._call(message)
                continue
            while self._held is None:
                try:
                    message = self._inbox.get(block=not busy)
                except queue.Empty:
                    break
                self._take(message)
                busy = True  # read what else has arrived, then step
            if self._engine.has_unfinished_requests():
                self._step()

    def _take(self, message: Message) -> None:
        try:
            if "abort" in message:
                self._engine.abort_request([str(message["abort"])])
                self._session_of.pop(str(message["abort"]), None)
            elif "end" in message:
                self._sessions.pop(message["end"], None)
            elif "tokens" not in message:
                self._held = message
            elif not self._complete:
                raise RuntimeError("the weights are incomplete: vLLM sleeps, or an update failed half way")
            else:
                parameters = self._vllm.SamplingParams(**message["parameters"], logprobs=0, detokenize=False)
                prompt = {"prompt_token_ids": self._whole(message)}
                self._engine.add_request(str(message["id"]), prompt, parameters)
        except Exception as error:  # fails this request only
            self._fail(message, error)

    def _whole(self, message: Message) -> list[int]:
        """The request's whole sequence: what is kept of its session, and its new tokens."""
        session = message.get("session")
        if session is None:
            return list(message["tokens"])
        # A session may be longer than what is kept of it: the last sample's answer came too late.
        kept = self._sessions.get(session, [])[: message["keep"]]
        if len(kept) < message["keep"]:
            raise RuntimeError(f"the session has {len(kept)} tokens, but {message['keep']} were to be kept")
        self._sessions[session] = [*kept, *message["tokens"]]
        self._session_of[str(message["id"])] = session
        return self._sessions[session]

    def _step(self) -> None:
        for finished in self._engine.step():
            if not finished.finished:
                continue
            output = finished.outputs[0]
            session = self._session_of.pop(finished.request_id, None)
            if session in self._sessions:
                self._sessions[session] = [*self._sessions[session], *output.token_ids]
            if output.finish_reason not in ("stop", "length"):
                # The client ignores this answer if it has aborted the request itself.
                reason = f"it ended without a sample (finish_reason {output.finish_reason!r})"
                self._answer({"id": int(finished.request_id), "error": reason})
                continue
            tokens = list(output.token_ids)
            logprobs = [places[token].logprob for token, places in zip(tokens, output.logprobs)]  # noqa: B905
            sample = {"tokens": tokens, "logprobs": logprobs, "stop": output.finish_reason}
            self._answer({"id": int(finished.request_id), **sample, "cached": finished.num_cached_tokens or 0})

    def _call(self, message: Message) -> None:
        try:
            if "chunk" in message:
                update = pickle.loads(base64.b64decode(message["chunk"]))  # from the parent process, over its pipe
                self._llm.update_weights({"update_info": update})
            elif "finish" in message:
                self._llm.finish_weight_update()
            elif "resume" in message:
                self._resume()
            elif "sleep" in message:
                self._complete = False
                # Level 2 would not keep the old weights in CPU memory, but for some models it loses more than weights.
                self._llm.sleep(level=1)
                self._asleep = True
            else:
                self._begin()
                if "start" in message:
                    self._llm.start_weight_update()
                else:
                    self._llm.collective_rpc("reload_weights", kwargs={"weights_path": message["weights"]})
                    self._resume()
        except Exception as error:
            self._fail(message, error)
        else:
            self._answer({"id": message["id"]})

    def _begin(self) -> None:
        self._complete = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])

    def _resume(self) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache, which belongs to the old weights")
        self._sessions.clear()  # as the client does
        self._complete = True

    def _fail(self, message: Message, error: Exception) -> None:
        self._answer({"id": message.get("id"), "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
