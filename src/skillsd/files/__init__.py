"""Files: written whole or not at all, read with one clear error if they are damaged, locked against other processes."""
