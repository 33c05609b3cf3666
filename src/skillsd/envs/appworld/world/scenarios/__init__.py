"""All scenarios, by their ids. One module per app; those that join two apps are in ``joins``."""

from __future__ import annotations

from . import spotify, venmo
from .base import Scenario

SCENARIOS: dict[str, Scenario] = {scenario.id: scenario for module in (spotify, venmo) for scenario in module.SCENARIOS}
