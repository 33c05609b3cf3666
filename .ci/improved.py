"""Fail unless both methods in a demo's summary.json beat the base model by more than chance would explain."""

import json
import sys
from pathlib import Path

MARGIN = 0.07
"""In accuracy. On 512 levels the standard error of a difference is about 3 points; training gained 12 to 19."""

summary = json.loads(Path(sys.argv[1]).read_text())
base = summary["base"]["accuracy"]
failed = False
for method in ("grpo", "skill-sd"):
    gain = summary[method]["accuracy"] - base
    print(f"{method}: {summary[method]['accuracy']:.1%}, base {base:.1%}, gain {100 * gain:+.1f} points")
    failed |= gain < MARGIN
sys.exit(f"a method gained less than {100 * MARGIN:.0f} points" if failed else 0)
