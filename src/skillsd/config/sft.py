"""The keys of a warm-start recipe (`skillsd sft`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from skillsd.config.schema import EnvironmentSection, ModelSection
from skillsd.options import Options


class ArchitectureSection(Options):
    """A new Llama-type decoder."""

    hidden_size: int = Field(96, ge=8)
    """Width of the residual stream."""
    layers: int = Field(3, ge=1)
    """Number of layers."""
    heads: int = Field(4, ge=1)
    """Number of attention heads."""
    intermediate_size: int = Field(256, ge=8)
    """Width of the MLP."""
    max_length: int = Field(512, ge=16)
    """The most tokens of a sequence."""
    vocabulary: int = Field(1024, ge=300)
    """The most tokens of the new tokenizer, a byte-level BPE learnt on demonstrations."""


class WarmStartSection(Options):
    """The supervised training."""

    steps: int = Field(1000, ge=1)
    """Optimiser steps."""
    batch: int = Field(64, ge=1)
    """Demonstrations per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(50, ge=0)
    """Steps over which the learning rate rises; after that it falls along a cosine to a tenth."""
    beta2: float = Field(0.98, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is clipped to this norm."""
    observation_weight: float = Field(0.2, ge=0)
    """Weight of the environment's tokens; action tokens weigh 1, the prompt 0."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Tokens in one forward pass. Changes memory and speed, not the gradient."""
    demonstrations: dict[str, Any] = Field(default_factory=dict)
    """Options of the environment's demonstrations."""
    template: str = "teacher"
    """How a demonstration's skill is worded in its prompt; must be the later run's ``skills.template``."""


class CheckSection(Options):
    """What is played after a warm start: is the model worth reinforcement learning? docs/models.md."""

    split: str = "tune"
    """Never the training split; keep ``test`` for the end."""
    limit: int | None = Field(None, ge=1)
    """Only this many tasks, evenly spaced from easy to hard."""
    samples: int = Field(2, ge=1)
    """Sampled episodes per task and prompt; one more is played greedily."""
    turn_tokens: int = Field(64, ge=1)
    """The most tokens of a turn."""
    concurrency: int = Field(256, ge=1)
    """The most episodes under way at once."""


class SftConfig(Options):
    """One warm start: supervised training on an environment's demonstrations."""

    name: str
    """Name of the new model; its default folder is ``models/NAME``."""
    seed: int = Field(0, ge=0)
    """Of everything random in it."""
    model: ModelSection = ModelSection()
    new: ArchitectureSection | None = None
    """Make a new model and tokenizer instead of loading ``model.name``."""
    environment: EnvironmentSection = EnvironmentSection()
    warm_start: WarmStartSection = WarmStartSection()
    check: CheckSection = CheckSection()
