"""What was freed stays with the process until it is asked for here; it goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library (glibc) can: it keeps up to a few dozen MiB by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def gives_back_freed(work: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return the function, after which all that it held and let go is back with the system."""

    @wraps(work)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        result = work(*args, **kwargs)
        give_back_freed()
        return result

    return wrapped
