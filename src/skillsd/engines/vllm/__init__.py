"""Rollouts by vLLM: `engine` is the engine, `client` and `worker` the two ends of the process that runs vLLM."""
