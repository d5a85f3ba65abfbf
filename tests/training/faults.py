"""A disk that fails, or a process that dies, at the Nth operation that changes the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from keeptune.training import tensors


class Killed(BaseException):
    """Stands for SIGKILL: from here on, nothing that the process still does reaches the disk."""


class Disk:
    """Counts operations; the one with number `fail_at`, counted from 1, does not happen."""

    def __init__(self, fault: Callable[[], BaseException], *, fail_at: int | None, stays: bool) -> None:
        self.fault = fault
        self.fail_at = fail_at
        self.stays = stays
        self.num_operations = 0

    @property
    def failed(self) -> bool:
        return self.fail_at is not None and self.num_operations >= self.fail_at

    def wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        is_open = operation.__name__ == "open"

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
            reads = is_open and mode in ("r", "rb")
            # A removal that forgives errors is one that the program can do without.
            forgiving = kwargs.get("ignore_errors", False) or kwargs.get("missing_ok", False)
            if reads or (forgiving and not self.stays):
                return operation(*args, **kwargs)
            self.num_operations += 1
            if self.num_operations == self.fail_at or (self.stays and self.failed):
                raise self.fault()
            return operation(*args, **kwargs)

        return wrapped


@contextlib.contextmanager
def disk(fault: Callable[[], BaseException], *, fail_at: int | None, stays: bool) -> Iterator[Disk]:
    """Put a failing disk under keeptune; with `stays`, everything after the fault fails as well."""
    failing = Disk(fault, fail_at=fail_at, stays=stays)
    places = [
        *((Path, name) for name in ("mkdir", "open", "rename", "replace", "unlink")),
        (os, "fsync"),
        (shutil, "rmtree"),
        (tensors, "save_file"),
    ]
    with contextlib.ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, failing.wrap(getattr(place, name))))
        yield failing


def killed(fail_at: int | None) -> contextlib.AbstractContextManager[Disk]:
    return disk(Killed, fail_at=fail_at, stays=True)


def full(fail_at: int | None) -> contextlib.AbstractContextManager[Disk]:
    return disk(lambda: OSError(errno.ENOSPC, "No space left on device"), fail_at=fail_at, stays=False)
