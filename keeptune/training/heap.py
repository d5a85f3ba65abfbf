"""Blocks taken and given back arrive on stdin, how far the heap of the C library grew for them leaves on stdout.

Run as a program, in a process whose heap holds nothing else. A positive number takes a block of so many bytes; -k gives
the k-th block back. Nothing is written to the blocks: they take addresses and hardly any memory.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from typing import Any

# What torch aligns its blocks to. Smaller ones are objects of C++, which `malloc` aligns.
_ALIGNMENT = 64
_SMALL_BYTES = 1024
# A process that has loaded a model has given larger blocks back. glibc then takes blocks up to its limit of 32 MiB
# from the heap, and no longer from the system one by one.
_LARGEST_IN_HEAP = 32 * 1024 * 1024 - 64 * 1024
_SET_THP_DISABLE = 41
_FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def heap_growth_bytes(events: Sequence[int]) -> int | None:
    """Return the most by which the heap grew; None where the C library cannot tell (macOS, musl) or refuses a block."""
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2") or not hasattr(libc, "prctl"):
        return None
    libc.mallinfo2.restype = _MallInfo
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    # In a huge page the header of an untouched block would take two megabytes.
    libc.prctl(_SET_THP_DISABLE, 1, 0, 0, 0)
    libc.free(libc.malloc(_LARGEST_IN_HEAP))
    start_bytes, peak_bytes = _held_bytes(libc), 0
    blocks: list[int | None] = []
    for event in events:
        if event < 0:
            libc.free(blocks[-event - 1])
            continue
        block = _take(libc, event)
        if block is None:
            return None
        blocks.append(block)
        if event >= _SMALL_BYTES:
            peak_bytes = max(peak_bytes, _held_bytes(libc) - start_bytes)
    return peak_bytes


def _take(libc: Any, num_bytes: int) -> int | None:
    if num_bytes < _SMALL_BYTES:
        return libc.malloc(num_bytes)
    pointer = ctypes.c_void_p()
    refused = libc.posix_memalign(ctypes.byref(pointer), _ALIGNMENT, num_bytes)
    return None if refused else pointer.value


def _held_bytes(libc: Any) -> int:
    info = libc.mallinfo2()
    return info.arena + info.hblkhd


if __name__ == "__main__":
    sys.stdout.write(json.dumps(heap_growth_bytes(json.load(sys.stdin))))
