"""Freed memory is kept where glibc is the allocator, and nothing is touched elsewhere."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from keeptune.model.memory import keep_freed_memory


def test_nothing_is_changed_where_glibc_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()


def test_both_thresholds_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        options[option] = value
        return 1

    monkeypatch.setattr(sys, "platform", "linux")
    library = SimpleNamespace(mallopt=mallopt, gnu_get_libc_version=lambda: b"2.36")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory()
    assert options == {-1: 1 << 30, -3: 1 << 30}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_large_block_is_not_mapped_anew() -> None:
    code = """
import resource
from keeptune.model.memory import keep_freed_memory
import torch
assert keep_freed_memory()
for round in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2000  # 80 MB are 19,532 pages of 4 KiB
