"""The training loop: one iteration, its parts, and checkpoints."""
