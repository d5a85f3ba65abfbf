"""Reading a run folder that may be partial: a path arrives, JSON values leave, and what is missing is noted.

A report is worth most when a run went wrong, so nothing here raises because of a file's content: an absent or broken
part becomes a note that stands on the page and in `report.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeptune.storage import SEAL, storage_errors

_MAX_NOTES_PER_FILE = 3


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder and the notes about its absent or broken parts, in the order in which they were found."""

    path: Path
    notes: list[str] = field(default_factory=list)

    def object(self, name: str, *, expected: bool = True) -> dict[str, Any]:
        """Return the JSON object in file `name` without its own hash; an empty one, noted, where there is none.

        Raises:
            StorageError: the disk refuses to read a file that exists.
        """
        path = self.path / name
        if not path.is_file():
            if expected:
                self.notes.append(f"{name}: not there")
            return {}
        with storage_errors(path):
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.notes.append(f"{name}: no valid JSON ({error})")
            return {}
        if not isinstance(value, dict):
            self.notes.append(f"{name}: found {type(value).__name__}; expected a JSON object")
            return {}
        return {key: part for key, part in value.items() if key != SEAL}

    def lines(self, name: str, *, expected: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of a JSON lines file, one line in memory at a time; broken lines are noted.

        Raises:
            StorageError: the disk refuses to read a file that exists.
        """
        path = self.path / name
        if not path.is_file():
            if expected:
                self.notes.append(f"{name}: not there")
            return
        broken: list[int] = []
        with storage_errors(path), path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                value = _parsed(line)
                if isinstance(value, dict):
                    yield value
                elif line.strip():
                    broken.append(number)
        if broken:
            shown = ", ".join(map(str, broken[:_MAX_NOTES_PER_FILE]))
            more = f" and {len(broken) - _MAX_NOTES_PER_FILE} more" if len(broken) > _MAX_NOTES_PER_FILE else ""
            self.notes.append(f"{name}: left out broken lines {shown}{more}")

    def text(self, name: str) -> str:
        """Return a text file's content; empty, noted, where there is none.

        Raises:
            StorageError: the disk refuses to read a file that exists.
        """
        path = self.path / name
        if not path.is_file():
            self.notes.append(f"{name}: not there")
            return ""
        with storage_errors(path):
            return path.read_text(encoding="utf-8", errors="replace")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """Return a JSON number as a float (NaN and infinities included), None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def finite(value: Any) -> float | None:
    """Return a JSON number as a float, None for anything else and for what is not finite."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """Return a JSON number as an int, None for anything else and for what is not finite."""
    found = number(value)
    return int(found) if found is not None and math.isfinite(found) else None


def string(value: Any) -> str | None:
    """Return a JSON string, None for anything else."""
    return value if isinstance(value, str) else None


def rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the objects in a JSON array, none for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def strings(value: Any) -> tuple[str, ...]:
    """Return the strings in a JSON array, none for anything else."""
    return tuple(part for part in value if isinstance(part, str)) if isinstance(value, list) else ()


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def flat(value: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as text) of a JSON object, nested ones opened, lists of names joined, no nulls."""
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict):
            yield from flat(inner, prefix=f"{name}.")
        elif isinstance(inner, str):
            yield name, inner
        elif isinstance(inner, list) and all(isinstance(part, str) for part in inner):
            yield name, ", ".join(inner)
        elif isinstance(inner, float):
            yield name, f"{inner:.4g}"
        elif inner is not None:
            yield name, json.dumps(inner, ensure_ascii=False)
