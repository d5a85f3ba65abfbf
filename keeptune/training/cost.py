"""What a training costs in memory: a device arrives, its peak in bytes leaves, and memory faults leave named."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from keeptune.errors import OutOfMemoryError

_PROCESS = Path("/proc/self")
# torch has no exception of its own for host memory.
_HOST_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory")


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak count from now on; where the system cannot, it counts from the start of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # What earlier work freed but the allocator still holds would count as this work's.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # A kernel without this file, or a sandbox that forbids it, leaves the peak of the whole process.
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated by torch on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _PROCESS / "status"
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return peaks[0]
    # Linux counts kibibytes here, macOS bytes.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def lacks_memory(error: BaseException) -> bool:
    """Tell whether torch or Python raised `error` for want of memory, on a GPU or on the host."""
    host = any(message in str(error) for message in _HOST_MEMORY_MESSAGES)
    return host or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def memory_errors(where: str, *, tokens_per_micro_batch: int) -> Iterator[None]:
    """Turn a lack of memory inside the block, on a GPU or on the host, into one `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise OutOfMemoryError(
            f"{where}: found too little memory for micro-batches of {tokens_per_micro_batch:,} tokens; expected room "
            "for one forward and backward pass. Lower training.tokens_per_micro_batch, or set "
            "training.gradient_checkpointing=true."
        ) from error
