"""What a jail holds on this machine: prints the list as JSON. Run by AppWorld's own Python; opens no world."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import world


def main() -> None:
    # Where the engine lies, without the seconds that it takes to import.
    engine = types.ModuleType("appworld")
    spec = importlib.util.find_spec("appworld")
    assert spec is not None
    engine.__file__ = spec.origin
    sys.modules["appworld"] = engine
    with tempfile.TemporaryDirectory(prefix="skillsd-appworld-") as folder:
        jail = world.Jail(json.loads(sys.argv[1]) | {"socket": f"{folder}/socket", "data": folder})
        jail.start()
        try:
            jail.greet({"apis": {}, "datetime": "2023-05-18T12:00:00"})
            print(json.dumps(jail.held))
        finally:
            jail.stop()


if __name__ == "__main__":
    main()
