"""Print the protections that jails have on this machine, as JSON. Run by AppWorld's Python; opens no world.

``python probe.py OPTIONS ROOT``; ROOT is the folder that contains AppWorld's ``data``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from jails import Jails


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="skillsd-appworld-") as folder:
        jails = Jails(json.loads(sys.argv[1]) | {"socket": f"{folder}/socket", "data": sys.argv[2]})
        try:
            print(json.dumps(jails.strongest()["protections"]))
        finally:
            jails.process.kill()
            jails.process.wait()


if __name__ == "__main__":
    main()
