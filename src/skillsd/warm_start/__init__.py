"""Warm start: a model that plays weakly and follows skills, made by supervised training on demonstrations."""
