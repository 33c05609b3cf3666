"""Rollouts: a policy plays episodes in an environment."""
