"""Engines hold the model: `base` is the interface, `torch` the embedded engine, `vllm` a sampler for any learner."""
