"""Prompts: chat messages to token ids with the model's chat template, and skills to text."""
