"""The command line, `skillsd`."""
