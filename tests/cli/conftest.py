from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import Command, Result

from skillsd.cli.app import main
from skillsd.cli.common import console


@pytest.fixture
def skillsd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`skillsd(*arguments)`, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", 300)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["skillsd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return call
