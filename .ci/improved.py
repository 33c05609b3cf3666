"""Fail unless a demo's summary.json shows that everything learnt, and that a skill teaches where it can."""

import json
import sys
from pathlib import Path

SOKOBAN_GAIN = 0.07
"""Of each method over the base model, in accuracy. On 512 levels the standard error of a difference is about 3 points;
training gained 12 to 19."""
RULEBOOK_GAP = 0.5
"""Of Skill-SD over GRPO and over self-imitation, in accuracy. See docs/results/skills.md for the usual gap."""

summary = json.loads(Path(sys.argv[1]).read_text())
failures = []


def check(what: str, figure: float, least: float) -> None:
    print(f"{what}: {100 * figure:+.1f} points, expected at least {100 * least:+.0f}")
    if figure < least:
        failures.append(what)


sokoban, rulebook = summary["sokoban"], summary["rulebook"]
for method in ("grpo", "skill-sd"):
    gain = sokoban[method]["accuracy"] - sokoban["base"]["accuracy"]
    check(f"sokoban, {method} over the base model", gain, SOKOBAN_GAIN)
for method in ("grpo", "grpo-imitation"):
    gap = rulebook["skill-sd-frozen"]["accuracy"] - rulebook[method]["accuracy"]
    check(f"rulebook, skill-sd-frozen over {method}", gap, RULEBOOK_GAP)
sys.exit(f"too little: {'; '.join(failures)}" if failures else 0)
