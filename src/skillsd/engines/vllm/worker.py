"""vLLM's side of `VllmEngine`: a process of its own, run by an interpreter that has vLLM. It needs nothing else.

JSON lines: on stdin first vLLM's options, then requests; on stdout ``ready`` and the answers; vLLM's own words all go
to stderr. Requests are taken up between two decoding steps, so they join and leave the batch at any time. New weights
wait until all that was asked of the old ones is finished, and hold up what is asked after them. When stdin ends, for
whatever reason, so does the process.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
from typing import Any

Message = dict[str, Any]


def main() -> None:
    sys.path.pop(0)  # this folder: what lies here is for the other side
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    inbox: queue.Queue[Message] = queue.Queue()
    options = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(inbox, options["model"]), daemon=True).start()

    def answer(message: Message) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        # The engine steps in this process: nothing is left behind when it goes, and a step is a function call.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            options.setdefault("enforce_eager", True)  # else it compiles, for minutes, and decodes no faster
            # A prompt that is read in parts takes back a random number that it did not need: not with a CPU's generator
            # ("CPU Generator does not use offset").
            options.setdefault("enable_chunked_prefill", False)
            options.setdefault("max_num_batched_tokens", max(4096, options["max_model_len"]))
        llm = vllm.LLM(**options)
    except BaseException as error:
        answer({"fatal": f"{type(error).__name__}: {error}"})
        raise
    answer({"ready": vllm.__version__})
    Worker(llm, vllm, inbox, answer).serve()


def _listen(inbox: queue.Queue[Message], folder: str) -> None:
    for line in sys.stdin:
        inbox.put(json.loads(line))
    shutil.rmtree(folder, ignore_errors=True)  # the other side may have been killed
    os._exit(0)  # even in the middle of a step: nobody is there to hear of it


class Worker:
    """Reads requests and steps the engine, by turns."""

    def __init__(self, llm: Any, vllm: Any, inbox: queue.Queue[Message], answer: Any) -> None:
        self._llm, self._vllm, self._inbox, self._answer = llm, vllm, inbox, answer
        self._engine = llm.llm_engine
        self._held: Message | None = None  # new weights that wait for the old ones' requests

    def serve(self) -> None:
        while True:
            busy = self._engine.has_unfinished_requests()
            if self._held is not None and not busy:
                message, self._held = self._held, None
                self._reload(message)
                continue
            while self._held is None:
                try:
                    message = self._inbox.get(block=not busy)
                except queue.Empty:
                    break
                self._take(message)
                busy = True  # look whether more is there, then step
            if self._engine.has_unfinished_requests():
                self._step()

    def _take(self, message: Message) -> None:
        try:
            if "weights" in message:
                self._held = message
            elif "abort" in message:
                self._engine.abort_request([str(message["abort"])])
            else:
                parameters = self._vllm.SamplingParams(**message["parameters"], logprobs=0, detokenize=False)
                prompt = {"prompt_token_ids": message["tokens"]}
                self._engine.add_request(str(message["id"]), prompt, parameters)
        except Exception as error:  # of this request; the others are not to suffer
            self._fail(message, error)

    def _step(self) -> None:
        for finished in self._engine.step():
            if not finished.finished:
                continue
            output = finished.outputs[0]
            if output.finish_reason not in ("stop", "length"):
                # Where we have aborted it nobody waits, and this goes unheard.
                reason = f"it ended without a sample (finish_reason {output.finish_reason!r})"
                self._answer({"id": int(finished.request_id), "error": reason})
                continue
            tokens = list(output.token_ids)
            logprobs = [places[token].logprob for token, places in zip(tokens, output.logprobs)]  # noqa: B905
            self._answer(
                {"id": int(finished.request_id), "tokens": tokens, "logprobs": logprobs, "stop": output.finish_reason}
            )

    def _reload(self, message: Message) -> None:
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": message["weights"]})
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM keeps keys and values of the old weights: its prefix cache can't be reset")
        except Exception as error:
            self._fail(message, error)
        else:
            self._answer({"id": message["id"]})

    def _fail(self, message: Message, error: Exception) -> None:
        self._answer({"id": message.get("id"), "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
