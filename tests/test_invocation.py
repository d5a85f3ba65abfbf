"""A command ends with one message and the right code, whatever its standard streams and its machine do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keeptune import cli

KEEPTUNE = f"{sys.executable} -m keeptune.cli"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("{} --version >&-", 0, ""),
        ("{} --version >&- 2>&-", 0, ""),
        ("{} --version <&-", 0, ""),
        ("{} --version > /dev/full", 4, "keeptune: standard output: no space left; expected a place to read and write"),
        ("set -o pipefail; {} --help | true", 0, ""),
        ("{} check none.yaml 2>&-", 2, ""),
        ("{} check none.yaml 2> /dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_full_or_not_read_end_in_no_traceback(command: str, code: int, said: str) -> None:
    done = shell(command.format(KEEPTUNE))
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert done.stderr.startswith(said) and bool(done.stderr) is bool(said)


def test_what_a_terminal_has_no_code_for_is_written_as_escapes(tmp_path: Path) -> None:
    done = shell(f"{KEEPTUNE} check '{tmp_path}/é.yaml'", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, "\\xe9.yaml" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "x", "/data/a"),
            4,
            "/data/a: no space left; expected a place to read and write. Remedy",
        ),
        (OSError(errno.EDQUOT, "x", "/data/a"), 4, "/data/a: the disk quota is used up; expected"),
        (OSError(errno.EIO, "x", "/data/a"), 4, "/data/a: the disk reports an input/output error; expected"),
        (OSError(errno.EMFILE, "x"), 4, "this process: too many open files; expected"),
        (OSError(errno.ESTALE, "Stale file handle", "/data/a"), 4, "/data/a: [Errno 116] Stale file handle: '/data/a'"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found"), 4, "this process: no such file"),
        (
            RuntimeError("cannot write: No space left on device (os error 28)"),
            4,
            "this process: no space left; expected",
        ),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), 4, "this process: too many open"),
        (MemoryError(), 5, "found too little memory; expected room for the work."),
    ],
)
def test_what_the_machine_refuses_is_one_message_and_no_traceback(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_with_ranges", refused)
    monkeypatch.setattr(sys, "argv", ["keeptune", "check", "recipe.yaml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    written = capsys.readouterr().err
    assert (stop.value.code, written.count("\n")) == (code, 1)
    assert written.startswith(f"keeptune: {said}")


def test_a_fault_of_keeptune_s_own_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(cli, "load_with_ranges", refused)
    monkeypatch.setattr(sys, "argv", ["keeptune", "check", "recipe.yaml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    written = capsys.readouterr().err
    assert stop.value.code == 1
    assert "KeyError" in written and written.endswith("please report it with the lines above.\n")
