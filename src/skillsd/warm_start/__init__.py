"""Warm start: train a model on demonstrations until it plays weakly on its own and follows skills."""
