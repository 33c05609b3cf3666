"""A new model with its own vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from skillsd.config import ArchitectureSection
from skillsd.errors import UserError
from skillsd.warm_start.new_model import make_model


def test_no_reply_may_begin_with_another_one(tmp_path: Path) -> None:
    """A reply ends its turn: 12 would be read as 1, in the demonstrations and in every episode."""
    with pytest.raises(UserError, match="'1' is the beginning of the reply '12'"):
        make_model(tmp_path, ArchitectureSection(), [" 1 12 2"] * 3, ["1", "2", "12"], seed=0)
    small = ArchitectureSection(hidden_size=8, layers=1, heads=1, intermediate_size=8)
    make_model(tmp_path, small, [" 01 12 02"] * 3, ["01", "12", "02"], seed=0)
