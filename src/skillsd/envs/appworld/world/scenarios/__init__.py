"""All scenarios by id: one module per app, and ``joins`` for scenarios with two apps."""

from __future__ import annotations

from . import file_system, gmail, joins, phone, simple_note, spotify, todoist, venmo
from .base import Scenario

_MODULES = (spotify, venmo, simple_note, phone, todoist, gmail, file_system, joins)
SCENARIOS: dict[str, Scenario] = {scenario.id: scenario for module in _MODULES for scenario in module.SCENARIOS}
