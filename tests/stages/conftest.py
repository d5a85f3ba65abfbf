"""What tests of the stages may ask for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from keeptune import cli, invocation
from tests.stages import world


@pytest.fixture
def keeptune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> world.Keeptune:
    """Return what gives a command in this process, all but its signals."""
    monkeypatch.setattr(invocation.signal, "signal", lambda *_: None)

    def give(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(cli.__file__), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return subprocess.CompletedProcess(command, stop.value.code, *capsys.readouterr())

    return give
