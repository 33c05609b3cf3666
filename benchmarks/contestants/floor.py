"""The floor: the workload written by hand in plain torch. No model classes, no custom kernels, no compiler.

All 64 episodes run in lock step, so the keys and values of all rows are at the same slots of one preallocated cache;
where observations differ in length, a mask leaves slots out. A group's prompt is prefilled once and copied. The new
tokens of a turn (the last sampled token and the observation) take one forward pass, whose last position gives the next
turn's first token; the other tokens are single-token steps. It works only for this workload: no episode may stop early,
and all of them wait for each other.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import workload as work
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = work.TASKS * work.EPISODES


class Model:
    """Weights of a Qwen3 with as many key as query heads and tied embeddings; projections of one input are fused."""

    def __init__(self, folder: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        w = load_file(Path(folder) / "model.safetensors")
        self.heads, self.dim = config["num_attention_heads"], config["head_dim"]
        if config["num_key_value_heads"] != self.heads or not config["tie_word_embeddings"]:
            raise SystemExit("the floor needs a model with as many key as query heads and tied embeddings")
        self.eps = config["rms_norm_eps"]
        self.base = config["rope_parameters"]["rope_theta"]
        self.embedding, self.norm = w["model.embed_tokens.weight"], w["model.norm.weight"]
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            layer = {name.removeprefix(f"model.layers.{i}."): x for name, x in w.items() if f".layers.{i}." in name}
            attention = [layer[f"self_attn.{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")]
            self.layers.append({
                "before": layer["input_layernorm.weight"],
                "qkv": torch.cat(attention),
                "qk_norm": torch.stack([layer["self_attn.q_norm.weight"], layer["self_attn.k_norm.weight"]]),
                "o": layer["self_attn.o_proj.weight"],
                "after": layer["post_attention_layernorm.weight"],
                "gate_up": torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]),
                "down": layer["mlp.down_proj.weight"],
            })  # fmt: skip
        self.parameters = [self.embedding, self.norm, *(x for layer in self.layers for x in layer.values())]

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[length, dim]``; the sine includes the sign of "rotate half"."""
        half = self.dim // 2
        angle = torch.outer(torch.arange(length), self.base ** (-torch.arange(half) / half))
        return angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], 1)

    def qkv(self, layer: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[..., heads, dim]`` each, rotated, of x ``[..., hidden]``; cos and sin are
        ``[..., 1, 1, dim]``."""
        normed = F.rms_norm(x, x.shape[-1:], layer["before"], self.eps)
        both = F.linear(normed, layer["qkv"]).unflatten(-1, (3, self.heads, self.dim))
        qk = F.rms_norm(both[..., :2, :, :], (self.dim,), None, self.eps) * layer["qk_norm"].unsqueeze(1)
        qk = qk * cos + qk.roll(self.dim // 2, -1) * sin
        return *qk.unbind(-3), both[..., 2, :, :]

    def rest(self, layer: dict[str, Tensor], x: Tensor, attended: Tensor) -> Tensor:
        """The layer after attention: output projection and MLP, ``[..., hidden]``."""
        x = x + F.linear(attended, layer["o"])
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer["after"], self.eps), layer["gate_up"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer["down"])

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.eps), self.embedding)

    def hidden(self, ids: Tensor, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Hidden states of whole sequences ``[rows, tokens]``, padded on the right; each layer's keys and values are
        appended to `keep`."""
        cos, sin = (table[:, None, None] for table in self.rotation(ids.shape[1]))
        x = F.embedding(ids, self.embedding)
        for layer in self.layers:
            q, k, v = (part.transpose(1, 2) for part in self.qkv(layer, x, cos, sin))
            if keep is not None:
                keep.append((k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self.rest(layer, x, attended.transpose(1, 2).flatten(2))
        return x


def compare_with_transformers(model: Model, folder: str) -> float:
    """The largest difference between the logits and those of `transformers`; exits if it is above 1e-4."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(256, (3, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = float((model.logits(model.hidden(ids)) - theirs(ids).logits).abs().max())
    if not difference < 1e-4:
        raise SystemExit(f"the floor's logits differ from those of transformers by {difference}")
    return difference


# ---------------------------------------------------------------------------------------------------- the rollout


class Cache:
    """Keys and values of all layers, ``[rows * heads, slots, dim]`` each, and a mask of the slots that a row uses.

    Allocated once and used for every rollout: fresh memory costs a page fault every 4 KiB.
    """

    def __init__(self, model: Model, turns: int) -> None:
        widest = max(len(work.observation(task, turn)) for task in range(work.TASKS) for turn in range(turns)) + 4
        slots = 99 + turns * (work.TOKENS_A_TURN + widest)
        # Zeros rather than uninitialised memory: a masked slot is still multiplied by 0, and 0 * nan is nan.
        self.keys = [torch.zeros(ROWS * model.heads, slots, model.dim) for _ in model.layers]
        self.values = [torch.zeros(ROWS * model.heads, slots, model.dim) for _ in model.layers]
        self.bias = torch.zeros(ROWS, 1, slots)
        self.used = 0
        self.lengths = torch.zeros(ROWS, dtype=torch.long)
        cos, sin = model.rotation(slots)
        # The square root of attention's scale, on q and on k.
        self.cos, self.sin = cos * model.dim**-0.25, sin * model.dim**-0.25

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[tokens, 1, 1, dim]``."""
        return self.cos[positions][:, None, None], self.sin[positions][:, None, None]


@torch.inference_mode()
def roll_out(model: Model, tokenizer: Any, turns: int, cache: Cache) -> tuple[list[work.Episode], Tensor]:
    """Play all episodes; returns them and the log-probs of the sampled tokens, ``[rows, sampled]``."""
    tasks = [row // work.EPISODES for row in range(ROWS)]
    openings = tokenizer([work.opening(task) for task in range(work.TASKS)], add_special_tokens=False)["input_ids"]
    completions: list[list[int]] = [[] for _ in tasks]
    masks: list[list[int]] = [[] for _ in tasks]
    rewards = [0.0] * ROWS
    logprobs: list[Tensor] = []
    x = _prompt(model, cache, torch.tensor(openings))
    for turn in range(turns):
        sampled: list[Tensor] = []
        for step in range(work.TOKENS_A_TURN):
            if step:
                x = _one(model, cache, sampled[-1])
            distribution = model.logits(x).log_softmax(-1)
            choice = torch.multinomial(distribution.exp(), 1)
            logprobs.append(distribution.gather(1, choice))
            sampled.append(choice.squeeze(1))
        action = torch.stack(sampled, 1)
        for row, ids in enumerate(action.tolist()):
            completions[row] += ids
            masks[row] += [1] * len(ids)
        rewards = [work.reward(text) for text in tokenizer.batch_decode(action, skip_special_tokens=True)]
        if turn + 1 == turns:
            break
        text = [work.between_turns(task, turn) for task in range(work.TASKS)]
        by_task = tokenizer(text, add_special_tokens=False)["input_ids"]
        observations = [by_task[task] for task in tasks]
        for row, ids in enumerate(observations):
            completions[row] += ids
            masks[row] += [0] * len(ids)
        new = [[last, *ids] for last, ids in zip(sampled[-1].tolist(), observations, strict=True)]
        x = _chunk(model, cache, new)
    episodes = [
        work.Episode(openings[task], completion, mask, reward)
        for task, completion, mask, reward in zip(tasks, completions, masks, rewards, strict=True)
    ]
    return episodes, torch.cat(logprobs, 1)


def _prompt(model: Model, cache: Cache, ids: Tensor) -> Tensor:
    """Prefill each group's prompt once; hidden states ``[rows, hidden]`` of its last token."""
    kept: list[tuple[Tensor, Tensor]] = []
    x = model.hidden(ids, kept)
    length = ids.shape[1]
    for (k, v), keys, values in zip(kept, cache.keys, cache.values, strict=True):
        keys[:, :length] = (k * model.dim**-0.25).repeat_interleave(work.EPISODES, 0).flatten(0, 1)
        values[:, :length] = v.repeat_interleave(work.EPISODES, 0).flatten(0, 1)
    cache.bias.zero_()
    cache.used = length
    cache.lengths.fill_(length)
    return x[:, -1].repeat_interleave(work.EPISODES, 0)


def _one(model: Model, cache: Cache, ids: Tensor) -> Tensor:
    """Decode one token per row, ``[rows]`` -> ``[rows, hidden]``."""
    x = F.embedding(ids, model.embedding)
    cos, sin = cache.rotation(cache.lengths)
    end = cache.used + 1
    bias = cache.bias[:, :, :end]
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        q, k, v = model.qkv(layer, x, cos, sin)
        keys[:, end - 1], values[:, end - 1] = k.flatten(0, 1), v.flatten(0, 1)
        # One query per row: k @ q reads the keys in memory order, which is faster than q @ k^T or fused attention.
        scores = torch.bmm(keys[:, :end], q.reshape(-1, model.dim, 1)).view(ROWS, model.heads, end) + bias
        attended = torch.bmm(scores.softmax(-1).view(-1, 1, end), values[:, :end])
        x = model.rest(layer, x, attended.view(ROWS, -1))
    cache.used = end
    cache.lengths += 1
    return x


def _chunk(model: Model, cache: Cache, new: list[list[int]]) -> Tensor:
    """Feed several tokens per row, aligned at their ends; hidden states ``[rows, hidden]`` of the last ones.

    Position-wise work runs on the packed real tokens, ``[tokens]``; only attention is padded.
    """
    counts = torch.tensor([len(ids) for ids in new])
    width = int(counts.max())
    real = torch.arange(width) >= (width - counts).unsqueeze(1)  # [rows, width]
    row, column = real.nonzero(as_tuple=True)
    start, end = cache.used, cache.used + width
    cache.bias[:, 0, start:end].masked_fill_(~real, -math.inf)
    causal = torch.full((width, width), -math.inf).triu(1)
    mask = cache.bias[:, :, :end].repeat(1, width, 1)
    mask[:, :, start:] += causal
    mask.masked_fill_(~real.unsqueeze(2), 0.0)  # padded queries attend anywhere: a row of -inf would give nan
    position = cache.lengths[row] + column - (width - counts)[row]
    cos, sin = cache.rotation(position)
    x = F.embedding(torch.tensor([token for ids in new for token in ids]), model.embedding)
    padded = x.new_zeros(ROWS, width, 3, model.heads, model.dim)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        padded[row, column] = torch.stack(model.qkv(layer, x, cos, sin), 1)
        q, k, v = padded.permute(2, 0, 3, 1, 4)
        by_row = (keys.unflatten(0, (ROWS, -1)), values.unflatten(0, (ROWS, -1)))
        by_row[0][:, :, start:end], by_row[1][:, :, start:end] = k, v
        attended = F.scaled_dot_product_attention(
            q, by_row[0][:, :, :end], by_row[1][:, :, :end], attn_mask=mask.unsqueeze(1), scale=1.0
        )
        x = model.rest(layer, x, attended.transpose(1, 2)[row, column].flatten(1))
    cache.used = end
    cache.lengths += counts
    return x[counts.cumsum(0) - 1]


# ----------------------------------------------------------------------------------------------------- the update


class Trainer:
    """GRPO's clipped loss over padded batches, and AdamW."""

    def __init__(self, model: Model, *, rows: int, learning_rate: float) -> None:
        self.model, self.rows = model, rows
        for parameter in model.parameters:
            parameter.requires_grad_()
        self.adamw = torch.optim.AdamW(
            model.parameters, lr=learning_rate, betas=work.BETAS, eps=work.EPSILON, weight_decay=0.0, fused=True
        )

    def logprobs(self, episodes: Sequence[work.Episode]) -> Tensor:
        """Log-probs of the sampled tokens, ``[sampled]``."""
        whole = [torch.tensor(e.prompt + e.completion) for e in episodes]
        marks = [torch.tensor([0] * len(e.prompt) + e.mask, dtype=torch.bool) for e in episodes]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        mark = torch.nn.utils.rnn.pad_sequence(marks, batch_first=True)[:, 1:]
        logits = self.model.logits(self.model.hidden(ids[:, :-1])[mark])
        return logits.log_softmax(-1).gather(1, ids[:, 1:][mark].unsqueeze(1)).squeeze(1)

    def step(self, groups: Sequence[Sequence[work.Episode]], old: dict[int, Tensor]) -> dict[str, float]:
        """One update.

        Args:
            old: log-probs under pi_old by the episode's number. Missing ones are filled in with the current policy's.
        """
        episodes: list[tuple[work.Episode, float, int]] = []
        for group in groups:
            mean = statistics.fmean(e.reward for e in group)
            episodes += [(e, e.reward - mean, len(episodes) + i) for i, e in enumerate(group)]
        episodes.sort(key=lambda item: len(item[0].completion))
        total = sum(sum(e.mask) for e, _, _ in episodes)
        loss_sum = 0.0
        for begin in range(0, len(episodes), self.rows):
            part = episodes[begin : begin + self.rows]
            new = self.logprobs([e for e, _, _ in part])
            counts = [sum(e.mask) for e, _, _ in part]
            for (_, _, number), piece in zip(part, new.detach().split(counts), strict=True):
                old.setdefault(number, piece)
            ratio = (new - torch.cat([old[number] for _, _, number in part])).exp()
            advantage = torch.tensor([a for _, a, _ in part]).repeat_interleave(torch.tensor(counts))
            clipped = ratio.clamp(1 - work.CLIP_RATIO, 1 + work.CLIP_RATIO)
            loss = -torch.minimum(ratio * advantage, clipped * advantage).sum() / total
            loss.backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters, work.CLIP_NORM)
        self.adamw.step()
        self.adamw.zero_grad()
        return {"loss": loss_sum, "grad_norm": norm.item(), "trained": total}


# ------------------------------------------------------------------------------------------------------- the jobs


def step(model: str, turns: int, steps: int, rows: int) -> dict[str, Any]:
    """Rollout and update, after a short warm-up step that also compares the log-probs of the two."""
    floor, tokenizer, clock = Model(model), AutoTokenizer.from_pretrained(model), work.Clock()
    difference = compare_with_transformers(floor, model)
    trainer, cache = Trainer(floor, rows=rows, learning_rate=1e-6), Cache(floor, turns)
    episodes, sampled = roll_out(floor, tokenizer, 2, cache)
    with torch.inference_mode():
        gap = float((trainer.logprobs(episodes) - sampled.flatten()).abs().max())
    if not gap < 1e-4:
        raise SystemExit(f"log-probs when sampled and when trained differ by {gap}: the rollout was wrong")
    trainer.step(_groups(episodes), {})
    measured = []
    for _ in range(steps):
        with clock("step"):
            with clock("rollout"):
                episodes, _ = roll_out(floor, tokenizer, turns, cache)
            done = trainer.step(_groups(episodes), {})
        tokens = {
            "sampled": sum(sum(e.mask) for e in episodes),
            "trained": int(done["trained"]),
            "sequence": sum(len(e.prompt) + len(e.completion) for e in episodes),
        }
        measured.append({**clock.take(), "tokens": tokens, "gap": gap})
    return {"steps": measured, "logits_difference": difference}


def _groups(episodes: Sequence[work.Episode]) -> list[Sequence[work.Episode]]:
    return [episodes[i : i + work.EPISODES] for i in range(0, ROWS, work.EPISODES)]


def rollout(model: str, turns: Sequence[int]) -> dict[str, Any]:
    """Rollouts alone, for each number of turns."""
    floor, tokenizer, clock = Model(model), AutoTokenizer.from_pretrained(model), work.Clock()
    cache = Cache(floor, max(turns))
    roll_out(floor, tokenizer, 2, cache)  # warm-up
    results = []
    for count in turns:
        with clock("rollout"):
            episodes, _ = roll_out(floor, tokenizer, count, cache)
        results.append({**clock.take(), "turns": count, "tokens": {"sampled": sum(sum(e.mask) for e in episodes)}})
    return {"rollouts": results}


def loss(model: str, rows: int = 8) -> dict[str, Any]:
    """Two updates on the given batch."""
    groups = work.loss_batch(AutoTokenizer.from_pretrained(model))
    trainer = Trainer(Model(model), rows=rows, learning_rate=work.LEARNING_RATE)
    old: dict[int, Tensor] = {}
    return {"updates": [trainer.step(groups, old) for _ in range(2)]}


if __name__ == "__main__":
    work.contestant({"step": step, "rollout": rollout, "loss": loss})
