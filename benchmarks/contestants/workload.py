"""The work that every contestant does. Plain Python, so that it runs in any contestant's environment.

8 tasks x 8 episodes of T turns. A prompt has 99 tokens, a turn exactly 8 sampled tokens, an observation 24 to 32. The
length of an observation depends only on the task and the turn, so every contestant processes the same number of tokens
whatever it samples. The vocabulary is the 256 bytes and four tokens of the chat template.

A contestant is a script that takes one job (JSON) and prints its result (JSON) as the last line.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TASKS = 8
EPISODES = 8
"""Per task: GRPO's group size."""
TOKENS_A_TURN = 8
MAX_LENGTH = 4096
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

# A turn of exactly 8 tokens is always truncated, so its end-of-turn token comes with the observation. Our renderer adds
# it; TRL assumes that a turn ended with that token, so in this template the tool's message begins with it. That way all
# contestants process the same ids. The list of tools is left out of the prompt for the same reason.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}<|end|><|user|>{{ m['content'] }}<|end|>"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# AdamW in the check of the loss: no warm-up, no decay, and a norm that really clips.
LEARNING_RATE, BETAS, EPSILON, CLIP_NORM, CLIP_RATIO = 1e-3, (0.9, 0.999), 1e-8, 0.1, 0.2


def task_id(task: int) -> str:
    return f"train-{task}"


def prompt(task: int) -> str:
    """96 characters: 99 tokens including the template's."""
    return f"{task_id(task)} ".ljust(96, "x")


def observation(task: int, turn: int) -> str:
    """20 to 28 characters: 24 to 32 tokens including the template's."""
    return "o" * (20 + random.Random(f"{task}/{turn}").randrange(9))


def between_turns(task: int, turn: int) -> str:
    """The observation with the template's tokens, as it stands between two turns."""
    return f"{END}{USER}{observation(task, turn)}{END}{ASSISTANT}"


def opening(task: int) -> str:
    """The prompt with the template's tokens, as it stands before the first turn."""
    return f"{USER}{prompt(task)}{END}{ASSISTANT}"


def reward(action: str) -> float:
    """The reward of an episode, in [0, 1], from its last action."""
    return (len(action) % 7) / 6


def expected_tokens(turns: int) -> dict[str, int]:
    """Tokens of a step: sampled, trained on (the same), and the total length of all sequences."""
    sampled = TASKS * EPISODES * turns * TOKENS_A_TURN
    observed = EPISODES * sum(len(observation(task, turn)) + 4 for task in range(TASKS) for turn in range(turns - 1))
    return {"sampled": sampled, "trained": sampled, "sequence": 99 * TASKS * EPISODES + observed + sampled}


def arithmetic(turns: int) -> float:
    """Operations of a rollout whose prompts are computed once per task: of the matrices, and of exact attention,
    a multiplication and an addition each."""
    hidden, inner, layers, vocabulary = 192, 512, 6, 260
    matrices = 2 * (layers * (4 * hidden**2 + 3 * hidden * inner) + hidden * vocabulary)
    attention = 4 * hidden * layers  # per earlier token: query times key, weight times value

    def up_to(length: int) -> float:
        return length * matrices + attention * length * (length + 1) / 2

    total = 0.0
    for task in range(TASKS):
        observed = sum(len(observation(task, turn)) + 4 for turn in range(turns - 1))
        total += EPISODES * (up_to(99 + observed + turns * TOKENS_A_TURN) - up_to(99)) + up_to(99)
    return total


def make_model(folder: Path) -> None:
    """Write the random model and its tokenizer. All contestants load the same weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"pad_token": PAD, "eos_token": END, "additional_special_tokens": [USER, ASSISTANT]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=48, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------ the batch of the check of the loss


@dataclass(frozen=True)
class Episode:
    """Token ids of an episode; `mask` is 1 for the completion's sampled tokens, 0 for observed ones."""

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    reward: float


def loss_batch(tokenizer: Any, turns: int = 6) -> list[list[Episode]]:
    """Groups of episodes with different numbers of turns, so that the token-weighted loss is not zero."""
    groups = []
    for task in range(TASKS):
        start = tokenizer.encode(opening(task), add_special_tokens=False)
        group = []
        for member in range(EPISODES):
            rng = random.Random(f"loss/{task}/{member}")
            completion: list[int] = []
            mask: list[int] = []
            for turn in range(1 + (task + 3 * member) % turns):
                if turn:
                    completion += tokenizer.encode(between_turns(task, turn - 1), add_special_tokens=False)
                    mask += [0] * (len(completion) - len(mask))
                completion += [rng.randrange(256) for _ in range(TOKENS_A_TURN)]
                mask += [1] * TOKENS_A_TURN
            group.append(Episode(start, completion, mask, rng.randrange(7) / 6))
        groups.append(group)
    return groups


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Clock:
    """Seconds by phase: CPU of the whole process (all threads), the system's share of it, and wall-clock.

    The system's share separates page faults on fresh memory from arithmetic.
    """

    cpu: dict[str, float] = field(default_factory=dict)
    system: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            for kind, seconds, before in zip(self._kinds(), self._now(), begin, strict=True):
                kind[phase] = kind.get(phase, 0.0) + seconds - before

    def _kinds(self) -> tuple[dict[str, float], ...]:
        return self.cpu, self.system, self.wall

    @staticmethod
    def _now() -> tuple[float, ...]:
        return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()

    def take(self) -> dict[str, dict[str, float]]:
        """The seconds since the last call."""
        taken = {"cpu": self.cpu, "system": self.system, "wall": self.wall}
        self.cpu, self.system, self.wall = {}, {}, {}
        return taken


def peak_mib() -> float:
    """Peak memory of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def contestant(jobs: dict[str, Callable[..., dict[str, Any]]], arguments: Sequence[str] | None = None) -> None:
    """Do the job given on the command line, ``{"job": name, ...}``, and print its result."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    options = json.loads(text)
    name = options.pop("job")
    if name not in jobs:
        raise SystemExit(f"unknown job {name!r}; this contestant has: {', '.join(jobs)}")
    import torch

    torch.set_num_threads(1)
    result = jobs[name](**options)
    print(json.dumps({**result, "peak_mib": peak_mib()}))
