"""Prompts: messages to token ids by the model's chat template, and skills to text by a template of words."""
