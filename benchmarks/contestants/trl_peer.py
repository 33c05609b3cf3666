"""TRL's GRPOTrainer on the workload, in its own environment: with `rollout_func` or with `environment_factory`.

TRL's settings are chosen for speed: no gradient checkpointing and no bfloat16 (both are on by default), nothing logged
or saved, the fastest per-device batch size here, and a static cache (10 % faster than the default one, which is copied
for every token: 20.6 instead of 23.0 CPU seconds for a rollout of 8 turns).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl.trainer.grpo_trainer as grpo
import workload as work
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


class RolloutDone(Exception):  # noqa: N818 (not an error)
    """Raised to end the training step after its rollout."""


# --------------------------------------------------------------------------------------------- (a) rollout_func


class Rollout:
    """An agent's rollout as in TRL's guide: all episodes generate a turn, then each environment steps."""

    def __init__(self, turns: int, environment_seconds: float) -> None:
        self.turns, self.environment_seconds = turns, environment_seconds

    def __call__(self, prompts: list[Any], trainer: grpo.GRPOTrainer) -> dict[str, list[Any]]:
        tokenizer = trainer.processing_class
        tasks = [int(messages[0]["content"].split()[0].removeprefix("train-")) for messages in prompts]
        openings = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
        completions: list[list[int]] = [[] for _ in prompts]
        masks: list[list[int]] = [[] for _ in prompts]
        rewards = [0.0] * len(prompts)
        for turn in range(self.turns):
            so_far = [opening + completion for opening, completion in zip(openings, completions, strict=True)]
            # num_generations=1: as in TRL's own tool loop, every episode has its own history.
            sampled, _ = trainer._generate_single_turn(so_far, None, {}, num_generations=1)
            for i, (task, ids) in enumerate(zip(tasks, sampled, strict=True)):
                completions[i] += ids
                masks[i] += [1] * len(ids)
                action = tokenizer.decode(ids, skip_special_tokens=True)
                if self.environment_seconds:
                    time.sleep(self.environment_seconds)
                rewards[i] = work.reward(action)
                if turn + 1 < self.turns:
                    observed = tokenizer.encode(work.between_turns(task, turn), add_special_tokens=False)
                    completions[i] += observed
                    masks[i] += [0] * len(observed)
        return {
            "prompt_ids": openings,
            "completion_ids": completions,
            "logprobs": None,
            "env_mask": masks,
            "score": rewards,
        }  # type: ignore[dict-item]  # TRL's own generation returns no log-probs either


def given_reward(prompts: list[Any], score: list[float], **_: Any) -> list[float]:
    return score


# --------------------------------------------------------------------------------------- (b) environment_factory


def echo_environment(environment_seconds: float) -> type:
    class Echo:
        """TRL calls `say` for each tool call; the result becomes the tool's message."""

        def reset(self, task: int, **_: Any) -> None:
            self._task, self._turn = task, 0

        def say(self, text: str) -> str:
            """
            Say something.

            Args:
                text: What to say.

            Returns:
                The observation.
            """
            if environment_seconds:
                time.sleep(environment_seconds)
            self._turn += 1
            return work.observation(self._task, self._turn - 1)

    return Echo


def every_turn_is_a_call(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
    """Replaces TRL's parser: a random model writes no tool call that could be parsed."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": text}}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def last_turn_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [work.reward(messages[-1]["content"]) for messages in completions]


# -------------------------------------------------------------------------------------------------- the trainer


class Meter(TrainerCallback):
    """Times each step from its start (before the rollout) to its end (after the optimiser), and counts its tokens."""

    def __init__(self) -> None:
        self.clock = work.Clock()
        self.steps: list[dict[str, Any]] = []
        self.tokens: dict[str, int] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step = self.clock("step")
        self._step.__enter__()
        self.tokens = {"sampled": 0, "trained": 0, "sequence": 0}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._step.__exit__(None, None, None)
        self.steps.append({**self.clock.take(), "tokens": self.tokens})

    def watch(self, trainer: grpo.GRPOTrainer, *, only_rollout: bool = False) -> None:
        generate, compute_loss = trainer._generate, trainer._compute_loss

        def timed(prompts: list[Any]) -> Any:
            with self.clock("rollout"):
                result = generate(prompts)
            openings, completions, masks = result[:3]
            self.tokens["sampled"] += sum(map(sum, masks))
            self.tokens["sequence"] += sum(map(len, openings)) + sum(map(len, completions))
            if only_rollout:
                raise RolloutDone
            return result

        def counted(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            self.tokens["trained"] += int((inputs["completion_mask"] * inputs["tool_mask"]).sum())
            return compute_loss(model, inputs)

        trainer._generate, trainer._compute_loss = timed, counted


def make_trainer(
    model: str, *, variant: str, turns: int, environment_seconds: float, rows: int, steps: int, **options: Any
) -> tuple[grpo.GRPOTrainer, Any]:
    """A trainer and, for ``rollout_func``, its rollout, which holds the number of turns.

    Args:
        variant: ``rollout_func`` or ``environment_factory``.
        rows: sequences per forward pass in the update; gradients are accumulated over the 64 of the batch.
    """
    batch = work.TASKS * work.EPISODES
    arguments = grpo.GRPOConfig(
        output_dir=str(Path(model).parent / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows, num_generations=work.EPISODES,
        max_steps=steps, max_completion_length=work.MAX_LENGTH, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
        loss_type="dapo", shuffle_dataset=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, max_tool_calling_iterations=turns - 1,
        generation_kwargs={
            "max_new_tokens": work.TOKENS_A_TURN, "min_new_tokens": work.TOKENS_A_TURN,
            "cache_implementation": "static",
        },
        **{"learning_rate": 1e-6, **options},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = range(work.TASKS)
    rows_of_data = {"prompt": [[{"role": "user", "content": work.prompt(t)}] for t in tasks], "task": list(tasks)}
    kind: dict[str, Any]
    if variant == "rollout_func":
        kind = {"rollout_func": Rollout(turns, environment_seconds), "reward_funcs": given_reward}
    elif variant == "environment_factory":
        tokenizer.response_schema = {}  # makes TRL call its parser, which is replaced
        grpo.parse_response = every_turn_is_a_call
        kind = {"environment_factory": echo_environment(environment_seconds), "reward_funcs": last_turn_reward}
    else:
        raise SystemExit(f"unknown variant {variant!r}; choose rollout_func or environment_factory")
    trainer = grpo.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_dict(rows_of_data),
        processing_class=tokenizer,
        **kind,
    )
    return trainer, kind.get("rollout_func")


def set_turns(trainer: grpo.GRPOTrainer, rollout: Rollout | None, turns: int) -> None:
    if rollout:
        rollout.turns = turns
    trainer.max_tool_calling_iterations = turns - 1


# ----------------------------------------------------------------------------------------------------- the jobs


def step(model: str, variant: str, turns: int, steps: int, rows: int, warm_up_turns: int = 2) -> dict[str, Any]:
    """Whole training steps, after a warm-up step of `warm_up_turns` turns that is not reported."""
    trainer, rollout = make_trainer(
        model, variant=variant, turns=turns, environment_seconds=0.0, rows=rows, steps=steps + 1
    )
    meter = Meter()
    meter.watch(trainer)

    class SetTurns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            set_turns(trainer, rollout, turns)

    set_turns(trainer, rollout, warm_up_turns)
    trainer.add_callback(SetTurns())
    trainer.add_callback(meter)
    before = work.peak_mib()
    trainer.train()
    return {"steps": meter.steps[1:], "peak_before_mib": before}


def rollout(model: str, variant: str, turns: int, environment_seconds: float) -> dict[str, Any]:
    """One rollout with a slow environment."""
    trainer, _ = make_trainer(
        model, variant=variant, turns=turns, environment_seconds=environment_seconds, rows=8, steps=1
    )
    meter = Meter()
    meter.watch(trainer, only_rollout=True)
    trainer.add_callback(meter)
    try:
        trainer.train()
    except RolloutDone:
        measured = {**meter.clock.take(), "turns": turns, "environment_seconds": environment_seconds}
        return {"rollouts": [{**measured, "tokens": {"sampled": meter.tokens["sampled"]}}]}
    raise RuntimeError("TRL ended the training without a rollout")


def loss(model: str, rows: int = 8) -> dict[str, Any]:
    """Two updates on the given batch: in the second, on the same samples, the ratio differs from 1."""
    trainer, _ = make_trainer(
        model, variant="rollout_func", turns=1, environment_seconds=0.0, rows=rows, steps=2, num_iterations=2,
        scale_rewards="none", learning_rate=work.LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=work.BETAS[0], adam_beta2=work.BETAS[1], adam_epsilon=work.EPSILON, max_grad_norm=work.CLIP_NORM,
        epsilon=work.CLIP_RATIO,
    )  # fmt: skip
    episodes = [episode for group in work.loss_batch(trainer.processing_class) for episode in group]
    trainer.rollout_func = lambda prompts, trainer: {
        "prompt_ids": [e.prompt for e in episodes],
        "completion_ids": [e.completion for e in episodes],
        "logprobs": None,
        "env_mask": [e.mask for e in episodes],
        "score": [e.reward for e in episodes],
    }
    meter, updates = Meter(), []
    meter.watch(trainer)
    compute_loss, clip = trainer._compute_loss, trainer.accelerator.clip_grad_norm_
    losses: list[float] = []

    def recorded(*arguments: Any) -> torch.Tensor:
        value = compute_loss(*arguments)
        losses.append(value.item())
        return value

    def recorded_norm(*arguments: Any, **options: Any) -> Any:
        norm = clip(*arguments, **options)
        updates.append({"loss": sum(losses), "grad_norm": float(norm), "trained": meter.tokens["trained"]})
        losses.clear()
        return norm

    trainer._compute_loss, trainer.accelerator.clip_grad_norm_ = recorded, recorded_norm
    trainer.add_callback(meter)
    trainer.train()
    return {"updates": updates}


if __name__ == "__main__":
    work.contestant({"step": step, "rollout": rollout, "loss": loss})
