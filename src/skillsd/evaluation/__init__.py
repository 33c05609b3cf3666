"""Evaluation: accuracy on held-out tasks, and the uplift of skills on training tasks."""
