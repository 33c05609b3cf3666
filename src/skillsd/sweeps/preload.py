"""What the processes of a sweep have in common; see `skillsd.sweeps.processes`."""

import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto  # noqa: F401

import skillsd.engines.torch.engine
import skillsd.runs.lifecycle
import skillsd.runs.subjects  # noqa: F401
