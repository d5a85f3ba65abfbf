"""Every error a user can cause, each with its exit code; nothing arrives, nothing leaves but exceptions.

A message has the form `where: found; expected. remedy.`
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import ClassVar, NoReturn

_MAX_LISTED = 10
_NUMBER = re.compile(r"\d+")
# A line of a file, or an element of it.
_ROW = re.compile(r"(:\d+|\[\d+\])(: [\w. ]+)?$")


class KeeptuneError(Exception):
    """A fault that the user can fix; its message says where, what was found, what was expected and how to fix it."""

    exit_code: ClassVar[int] = 1


class RecipeError(KeeptuneError):
    """The recipe, or something that it names, cannot be used."""

    exit_code = 2


class DataError(KeeptuneError):
    """The instruction data cannot be used as they are."""

    exit_code = 3


class StorageError(KeeptuneError):
    """A file or folder cannot be written or read."""

    exit_code = 4


class OutOfMemoryError(KeeptuneError):
    """The device has less memory than the step needs."""

    exit_code = 5


class NonFiniteError(KeeptuneError):
    """A loss or a gradient is NaN or infinite; the weights are those before the step."""

    exit_code = 6


class FolderInUseError(KeeptuneError):
    """Another process holds the output folder, or it belongs to another recipe."""

    exit_code = 7


class CheckpointError(KeeptuneError):
    """Checkpoints exist and none is valid."""

    exit_code = 8


class Interrupted(KeeptuneError):
    """A signal stopped the run after its state was saved."""

    exit_code = 143


def stopped(unfinished: str) -> Interrupted:
    """Return what is raised where a stop was asked for inside work that is kept whole or not at all."""
    return Interrupted(
        f"{unfinished}: stopped on request; those in progress are lost, everything finished before them stands. "
        "Give the same command again to go on."
    )


class Complaints:
    """Problems of one kind: the first ten different ones are listed, others and equal ones are counted.

    Two about different rows that say the same, but for numbers, are equal.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._num_others = 0

    def __len__(self) -> int:
        return sum(self._counts.values()) + self._num_others

    def add(self, problem: str) -> None:
        """Take in a problem of the form `where: found …`."""
        where, _, found = problem.partition(": found")
        row = _ROW.search(where)
        kind = _NUMBER.sub("0", found) if row else problem
        if kind not in self._counts and len(self._counts) == _MAX_LISTED:
            self._num_others += 1
            return
        self._first.setdefault(kind, problem)
        self._last[kind] = where[: row.end(1)] if row else where
        self._counts[kind] = self._counts.get(kind, 0) + 1

    @property
    def only(self) -> str | None:
        """The first problem where all are equal."""
        return next(iter(self._first.values())) if len(self._first) == 1 and not self._num_others else None

    def lines(self) -> list[str]:
        """Return a line for each different problem, with how often and where last it was met, and a count of others."""
        listed = []
        for kind, first in self._first.items():
            more, last = self._counts[kind] - 1, self._last[kind]
            again = f"The same at {last}." if more == 1 else f"The same {more:,} times more, the last at {last}."
            listed.append(f"{first} {again}" if more else first)
        return [*listed, *([f"and {self._num_others:,} more."] if self._num_others else [])]


def raise_collected(kind: type[KeeptuneError], problems: Iterable[str]) -> NoReturn:
    """Raise one error that lists the first ten different problems and counts equal ones and the rest."""
    complaints = Complaints()
    for problem in problems:
        complaints.add(problem)
    raise kind("\n".join(complaints.lines()))


def printable(text: str) -> str:
    """Return text in which control characters, as names of files and columns may hold, cannot steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def relative_start(path: Path) -> str:
    """Return the sentence, with a space before it, that says where a relative path starts; none for an absolute one."""
    if path.is_absolute():
        return ""
    return f" Relative paths start from {Path.cwd()}, where the command was given, not from the recipe's folder."


def import_extra(module: str, *, extra: str) -> ModuleType:
    """Import an optional library, or name the extra that installs it.

    Raises:
        RecipeError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise RecipeError(
            f"{module}: not installed; this setting needs it. Install it with `pip install 'keeptune[{extra}]'`."
        ) from error
