from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeptune.errors import OutOfMemoryError
from keeptune.training import cost
from keeptune.training.cost import memory_errors, peak_memory_bytes, reset_peak_memory

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


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_every_lack_of_memory_names_the_setting_to_change(fault: Exception) -> None:
    expected = r"step 3: found too little memory for micro-batches of 1,024 tokens;.*Lower training.tokens_per_micro"
    with pytest.raises(OutOfMemoryError, match=expected), memory_errors("step 3", tokens_per_micro_batch=1024):
        raise fault


def test_a_real_allocation_that_cannot_be_is_named() -> None:
    with pytest.raises(OutOfMemoryError), memory_errors("step 3", tokens_per_micro_batch=1024):
        torch.empty(1 << 55, dtype=torch.int8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors("step 3", tokens_per_micro_batch=1024):
        raise RuntimeError("shape")
