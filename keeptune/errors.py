"""Every error a user can cause, each with its exit code; nothing arrives, nothing leaves but exceptions.

A message has the form `where: found; expected. remedy.`
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar, NoReturn

_MAX_LISTED = 10


class KeeptuneError(Exception):
    """A fault that the user can mend; its message says where, what was found, what was expected and how to mend it."""

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
        f"{unfinished}: found a request to stop; those that were being made are lost, everything that was finished "
        "before stands. Give the same command again to go on."
    )


def raise_collected(kind: type[KeeptuneError], problems: Sequence[str]) -> NoReturn:
    """Raise one error that lists the first ten problems and counts the rest."""
    listed = list(problems[:_MAX_LISTED])
    if len(problems) > _MAX_LISTED:
        listed.append(f"and {len(problems) - _MAX_LISTED} more.")
    raise kind("\n".join(listed))


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
