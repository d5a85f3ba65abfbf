"""Work that may lack memory arrives; where it does, on a GPU or on the host, one named error leaves."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

from keeptune.errors import OutOfMemoryError

# torch has an exception of its own for the memory of a GPU alone, and not for all that want some of it.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")


def lacks_memory(error: BaseException) -> bool:
    """Tell whether torch, Python or the system raised `error` for want of memory, on a GPU or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn a lack of memory inside the block into an `OutOfMemoryError` that says `message`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not lacks_memory(error):
            raise
        raise OutOfMemoryError(message) from error
