"""AppWorld: the real engine in its own environment and processes; nothing here imports the package `appworld`."""
