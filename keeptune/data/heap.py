"""What was freed stays with the process until it is asked for here; it goes back to the system."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library (glibc) can: it keeps up to a few dozen MiB by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
