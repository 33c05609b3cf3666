"""What `skillsd envs list` shows: a line per environment, and per set-up that belongs to none."""

from __future__ import annotations

from skillsd.envs import registry, setups
from skillsd.errors import UserError

READY, NOT_SET_UP, NOT_READY = "ready", "not set up", "not ready"


def lines() -> list[str]:
    """Name, state, and either the sizes of the splits or what to do."""
    names = registry.names()
    rows = [(name, *_environment(name)) for name in names]
    rows += [(name, *_setup(name)) for name in setups.setups() if name not in names]
    width = max(len(name) for name, _, _ in rows) + 2
    return [f"{name:{width}}{state:12}{' '.join(details.split())}" for name, state, details in rows]


def _environment(name: str) -> tuple[str, str]:
    try:
        if name in setups.setups() and not setups.find(name).done():
            return _setup(name)
        task_set = registry.load(name)
        return READY, ", ".join(f"{split} {len(task_set.tasks(split))}" for split in task_set.splits)
    except UserError as error:
        return NOT_READY, str(error)
    except Exception as error:  # a broken third-party environment must not hide the others
        return NOT_READY, f"cannot be loaded: {error}"


def _setup(name: str) -> tuple[str, str]:
    try:
        setup = setups.find(name)
        return (READY, setup.installs) if setup.done() else (NOT_SET_UP, f"skillsd envs setup {name}: {setup.installs}")
    except Exception as error:
        return NOT_READY, f"cannot be loaded: {error}"
