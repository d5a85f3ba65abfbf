"""Work that may lack memory arrives; where it does, on a GPU or on the host, one named error leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from keeptune.errors import OutOfMemoryError

# torch has no exception of its own for host memory.
_HOST_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory")


def lacks_memory(error: BaseException) -> bool:
    """Tell whether torch or Python raised `error` for want of memory, on a GPU or on the host."""
    host = any(message in str(error) for message in _HOST_MEMORY_MESSAGES)
    return host or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn a lack of memory inside the block into an `OutOfMemoryError` that says `message`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise OutOfMemoryError(message) from error
