"""Skill-SD: skill-conditioned self-distillation for multi-turn LLM agents (arXiv 2604.10674).

Importing this package is light: torch and transformers are imported where they are used.
"""

__version__ = "0.1.0"
