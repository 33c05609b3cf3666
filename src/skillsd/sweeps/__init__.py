"""Studies: the same recipe trained by several methods, on several seeds and base models, side by side in one table."""
