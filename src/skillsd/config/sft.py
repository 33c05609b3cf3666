"""The keys of a warm-start recipe (`skillsd sft`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from skillsd.config.schema import EnvironmentSection, ModelSection, with_own_seed
from skillsd.options import Options


class ArchitectureSection(Options):
    """A new Llama-style decoder."""

    hidden_size: int = Field(96, ge=8)
    """Width of the residual stream."""
    layers: int = Field(3, ge=1)
    """Number of layers."""
    heads: int = Field(4, ge=1)
    """Number of attention heads."""
    intermediate_size: int = Field(256, ge=8)
    """Width of the MLP."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights. A narrow model learns faster with a larger one."""
    copying_steps: int = Field(0, ge=0)
    """Optimiser steps before the demonstrations on random words that come twice. They teach the model to copy from its
    context, which reading a skill needs. From demonstrations alone this can take thousands of steps."""
    max_length: int = Field(512, ge=16)
    """Maximum sequence length in tokens."""
    vocabulary: int = Field(1024, ge=300)
    """Maximum vocabulary size of the new tokenizer, a byte-level BPE trained on demonstrations."""


class WarmStartSection(Options):
    """Supervised training on demonstrations."""

    steps: int = Field(1000, ge=1)
    """Optimiser steps."""
    batch: int = Field(64, ge=1)
    """Demonstrations per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up; after that the learning rate decays along a cosine to a tenth of its peak."""
    beta2: float = Field(0.98, ge=0, lt=1)
    """AdamW's beta2."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum gradient norm."""
    observation_weight: float = Field(0.2, ge=0)
    """Loss weight of the environment's tokens. Action tokens have weight 1, the prompt 0."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = 16384
    """Maximum tokens per forward pass. Affects memory and speed, not the gradient."""
    demonstrations: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the environment's demonstrations."""
    template: str = "teacher"
    """Prompt template for a demonstration's skill. Use the same as ``skills.template`` of the later run."""
    place: Literal["before", "after"] = "before"
    """Where the skill stands: before or after the task. Use the same as ``skills.place`` of the later run."""


class CheckSection(Options):
    """The evaluation after a warm start: does the model follow skills well enough to train? See docs/models.md."""

    split: str = "tune"
    """Split to evaluate on; keep ``test`` for the end."""
    limit: int | None = Field(None, ge=1)
    """Evaluate on only this many tasks, evenly spaced by difficulty. Default: all."""
    samples: int = Field(2, ge=1)
    """Sampled episodes per task and prompt, in addition to a greedy one."""
    turn_tokens: int = Field(64, ge=1)
    """Maximum sampled tokens per turn."""
    concurrency: int = Field(256, ge=1)
    """Maximum number of concurrent episodes."""


class SftConfig(Options):
    """One warm start: supervised training on an environment's demonstrations."""

    name: str
    """Name of the new model; the default folder is ``models/NAME``."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the warm start."""
    model: ModelSection = ModelSection()
    new: ArchitectureSection | None = None
    """Create a new model and tokenizer instead of loading ``model.name``."""
    environment: EnvironmentSection = EnvironmentSection()
    warm_start: WarmStartSection = WarmStartSection()
    check: CheckSection = CheckSection()

    _fill_in_seed = model_validator(mode="before")(with_own_seed)
