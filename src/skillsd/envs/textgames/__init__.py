"""What the text games share: the environment, prompts, the rule-based summariser, demonstrations and host processes.

The games are in `skillsd.envs.textworld_express` and `skillsd.envs.scienceworld`. `host/` is run by their own Python.
"""
