"""A task's `path` arrives: one path, a list or a pattern; the names of its files leave."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from keeptune.errors import DataError

_PATTERN = re.compile(r"[*?\[]")


def shown_path(path: str | Sequence[str]) -> str:
    """Return a path as messages show it, a list by its first entry."""
    if isinstance(path, str):
        return path
    return f"{path[0]} and {len(path) - 1} more" if len(path) > 1 else path[0]


def local_path(path: str, *, base_folder: Path | None) -> Path:
    """Return a path as the file system has it; relative ones start from `base_folder`.

    Raises:
        DataError: it begins with a home folder that is none.
    """
    try:
        return (base_folder or Path()) / Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: found no such home folder; expected a path. Write it in full.") from error


def expanded(path: str | Sequence[str], *, base_folder: Path | None) -> list[str]:
    """Return the names that a list or a pattern stands for, a pattern's in their order; of one path, itself.

    What exists as it is written is no pattern.

    Raises:
        DataError: a pattern matches nothing, or a name stands there twice.
    """
    if isinstance(path, str):
        if not _PATTERN.search(path) or local_path(path, base_folder=base_folder).exists():
            return [path]
        # Path.glob looks into hidden folders, and raises what it likes at `**` beside other letters.
        matches = glob.glob(str(Path(path).expanduser()), root_dir=base_folder, recursive=True)  # noqa: PTH207
        found = sorted(str(Path(match)) for match in matches)
        if not found:
            raise DataError(f"{path}: found no file of such a name; expected one or more. Check the pattern.")
        return found
    names = [name for given in path for name in expanded(given, base_folder=base_folder)]
    places = [local_path(name, base_folder=base_folder).resolve() for name in names]
    if twice := [name for i, name in enumerate(names) if places[i] in places[:i]]:
        raise DataError(f"{twice[0]}: found this file twice in one task; expected it once. Remove one from `path`.")
    return names
