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
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{path}: found no such home folder; expected a path. Write it in full.") from error


def expanded(path: str | Sequence[str], *, base_folder: Path | None) -> list[str]:
    """Return the names that a list or a pattern stands for, a pattern's in their order; of one path, itself.

    What exists as it is written is no pattern. What keeptune wrote into a run folder is no data of a pattern's.

    Raises:
        DataError: a pattern matches nothing, or a name stands there twice.
    """
    if isinstance(path, str):
        if not _PATTERN.search(path) or local_path(path, base_folder=base_folder).exists():
            return [path]
        found, of_runs = _matches(path, base_folder=base_folder)
        if not found:
            other = f" outside of run folders, and {len(of_runs)} in them" if of_runs else ""
            raise DataError(f"{path}: found no file of such a name{other}; expected one or more. Check the pattern.")
        return found
    names = [name for given in path for name in expanded(given, base_folder=base_folder)]
    places = [local_path(name, base_folder=base_folder).resolve() for name in names]
    if twice := [name for i, name in enumerate(names) if places[i] in places[:i]]:
        raise DataError(f"{twice[0]}: found this file twice in one task; expected it once. Remove one from `path`.")
    return names


def of_runs(path: str | Sequence[str], *, base_folder: Path | None) -> list[str]:
    """Return the names that patterns match inside run folders, which `expanded` leaves out."""
    if not isinstance(path, str):
        return [name for given in path for name in of_runs(given, base_folder=base_folder)]
    if not _PATTERN.search(path) or local_path(path, base_folder=base_folder).exists():
        return []
    return _matches(path, base_folder=base_folder)[1]


def _matches(pattern: str, *, base_folder: Path | None) -> tuple[list[str], list[str]]:
    """Return what a pattern matches outside of run folders, and inside of them."""
    # Path.glob looks into hidden folders, and raises what it likes at `**` beside other letters.
    matches = glob.glob(str(Path(pattern).expanduser()), root_dir=base_folder, recursive=True)  # noqa: PTH207
    names = sorted(str(Path(match)) for match in matches)
    folders = {parent for name in names for parent in local_path(name, base_folder=base_folder).parents}
    runs = {folder for folder in folders if _is_run(folder)}
    inside = [name for name in names if not runs.isdisjoint(local_path(name, base_folder=base_folder).parents)]
    return [name for name in names if name not in set(inside)], inside


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and any(
        (folder / name).is_file() for name in (".lock", "data/audit.json")
    )
