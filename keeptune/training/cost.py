"""What a training costs in memory: a device arrives; its peak, what is held and what is left leave, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch
from torch import nn

_PROCESS, _SYSTEM, _LIMITS = Path("/proc/self"), Path("/proc"), Path("/sys/fs/cgroup")


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak count from now on; where the system cannot, it counts from the start of the process."""
    _give_back_free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # A kernel without this file, or a sandbox that forbids it, leaves the peak of the whole process.
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated by torch on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak_bytes = _number_of_bytes(_PROCESS / "status", "VmHWM:")
    if peak_bytes is not None:
        return peak_bytes
    # Linux counts kibibytes here, macOS bytes.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def runtime_memory_bytes(model: nn.Module, *, device: torch.device) -> int:
    """Return what the process holds beside the tensors of `model`; none of it counts on a GPU."""
    if device.type == "cuda":
        return 0
    _give_back_free_memory()
    held_bytes = _number_of_bytes(_PROCESS / "status", "VmRSS:") or peak_memory_bytes(device)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cpu"]
    return max(0, held_bytes - sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def available_memory_bytes(device: torch.device) -> int | None:
    """Return what this process could hold in all, within a container's limit; None where the system cannot tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free_bytes = _number_of_bytes(_SYSTEM / "meminfo", "MemAvailable:")
    own_bytes = _number_of_bytes(_PROCESS / "status", "VmRSS:")
    if free_bytes is None or own_bytes is None:
        return None
    # Of control groups version 2 and 1; "max" is no limit.
    files = [path for name in ("memory.max", "memory/memory.limit_in_bytes") if (path := _LIMITS / name).exists()]
    limits_bytes = [int(text) for path in files if (text := path.read_text(encoding="ascii").strip()).isdigit()]
    return min([free_bytes + own_bytes, *limits_bytes])


def _give_back_free_memory() -> None:
    """What earlier work freed but the allocator still holds would count as later work's."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _number_of_bytes(path: Path, name: str) -> int | None:
    """Return the value of a line of `/proc`, which is given in kibibytes."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
