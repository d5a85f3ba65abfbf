from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeptune.training import cost
from keeptune.training.cost import peak_memory_bytes, reset_peak_memory

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
