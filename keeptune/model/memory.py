"""How this process keeps memory that tensors gave back; nothing arrives, a word whether it could be set leaves."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of glibc: sizes from which a block is mapped by itself, and from which free memory goes back.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of freed tensors up to 1 GiB each, for the rest of this process.

    By default glibc maps every large tensor anew, and the kernel clears each of its pages at first touch: a third of
    the time of a small model's step on a CPU. Elsewhere (macOS, Windows, musl, another allocator) nothing is changed
    and False is returned.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, _KEEP_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
