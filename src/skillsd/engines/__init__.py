"""Engines: where the model lives. `base` says what one does, `torch` is the embedded one."""
