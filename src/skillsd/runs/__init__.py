"""Runs: build, check, train or resume, evaluate, export and read a run in its folder."""
