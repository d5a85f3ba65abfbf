from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeptune.training import cost
from keeptune.training.cost import available_memory_bytes, peak_memory_bytes, reset_peak_memory

from .tiny import CPU


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset a process's peak")
def test_the_peak_counts_from_the_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    block = torch.ones(40_000_000)
    assert peak_memory_bytes(CPU) > before + 100_000_000
    del block
    high = peak_memory_bytes(CPU)
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < high - 100_000_000


def test_a_system_without_proc_gives_the_peak_of_the_whole_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cost, "_PROCESS", tmp_path / "gone")
    reset_peak_memory(CPU)
    assert 50_000_000 < peak_memory_bytes(CPU) < 100_000_000_000


def test_what_is_left_ends_at_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 3000 kB\n")
    (tmp_path / "status").write_text("VmHWM: 2000 kB\nVmRSS: 1000 kB\n")
    for name in ("_PROCESS", "_SYSTEM", "_LIMITS"):
        monkeypatch.setattr(cost, name, tmp_path)
    assert available_memory_bytes(CPU) == 4_096_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(CPU) == 4_096_000
    (tmp_path / "memory.max").write_text("2500000\n")
    assert available_memory_bytes(CPU) == 2_500_000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("2000000\n")
    assert available_memory_bytes(CPU) == 2_000_000
