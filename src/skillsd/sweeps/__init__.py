"""Sweeps: one recipe trained by several methods, on several seeds and base models, compared in a table."""
