"""`data/audit.json` arrives; what was read, dropped, found twice, leaked and measured leaves, in the page's order.

A count that this module does not know by name still reaches the page, under its own name: an audit hides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import SPLIT_NAMES
from keeptune.report.reading import RunFolder, flat, mapping, number, rows, whole

_MAX_EXAMPLES = 6
_LENGTH_COLUMNS = ("p50", "p90", "p99", "max", "mean")
_SPLIT_KEYS = ("splits", "counts", "records")
Counts = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """How many records of a task stand in each split."""

    task: str
    train: int
    validation: int
    test: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a part of the records; None where it was not measured."""

    part: str
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class Examples:
    """Cases that the audit shows, each as (field, value); `num_more` of them stand in `audit.json` alone."""

    title: str
    cases: tuple[tuple[tuple[str, str], ...], ...]
    num_more: int


@dataclass(frozen=True, slots=True)
class Audit:
    """`rows_in = kept + dropped`; `truncated` of the kept ones lost a part to the limit of tokens."""

    rows_in: int | None
    kept: int | None
    truncated: int | None
    dropped: Counts
    splits: tuple[SplitCounts, ...]
    leaks: Counts
    lengths: tuple[Lengths, ...]
    other: tuple[tuple[str, str], ...]
    examples: tuple[Examples, ...]

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to show."""
        return self.rows_in is None and not self.splits and not self.other

    @property
    def num_train(self) -> int | None:
        """The number of train records, None where the splits are not known."""
        return sum(split.train for split in self.splits) if self.splits else None


def read_audit(folder: RunFolder) -> Audit:
    """Return the audit of the run's data; an empty one, noted, where there is none.

    Raises:
        StorageError: the disk refuses to read a file that exists.
    """
    value = folder.object("data/audit.json")
    split_key = next((key for key in _SPLIT_KEYS if _tables(value.get(key))), None)
    shown = {"rows_in", "kept", "truncated", "dropped", "leaks", "lengths", split_key}
    rest = {key: inner for key, inner in value.items() if key not in shown}
    leaks = mapping(value.get("leaks"))
    return Audit(
        rows_in=whole(value.get("rows_in")),
        kept=whole(value.get("kept")),
        truncated=whole(value.get("truncated")),
        dropped=_counts(value.get("dropped")),
        splits=_splits(_tables(value.get(split_key)) if split_key else {}),
        leaks=_counts(leaks),
        lengths=tuple(_lengths(mapping(value.get("lengths")))),
        other=tuple((key, text) for key, text in flat(_without_lists(rest))),
        examples=tuple([*_examples(rest, prefix=""), *_examples(leaks, prefix="leaks.")]),
    )


def _tables(value: Any) -> dict[str, Mapping[str, Any]]:
    """Return the objects of an object of objects."""
    return {key: inner for key, inner in mapping(value).items() if isinstance(inner, dict)}


def _splits(tables: Mapping[str, Mapping[str, Any]]) -> tuple[SplitCounts, ...]:
    """Return counts per task from {task: {split: count}} or {split: {task: count}}."""
    if tables and set(tables) <= set(SPLIT_NAMES):
        tasks = dict.fromkeys(task for counts in tables.values() for task in counts)
        tables = {task: {split: counts.get(task) for split, counts in tables.items()} for task in tasks}
    return tuple(
        SplitCounts(task, *(whole(counts.get(split)) or 0 for split in SPLIT_NAMES))
        for task, counts in tables.items()
        if any(whole(counts.get(split)) is not None for split in SPLIT_NAMES)
    )


def _counts(value: Any) -> Counts:
    """Return (name, count) of {name: count} or of {name: {"count": count, ...}}, the largest first."""
    found = []
    for name, inner in mapping(value).items():
        number_found = whole(mapping(inner).get("count")) if isinstance(inner, dict) else whole(inner)
        if number_found is not None:
            found.append((name, number_found))
    return tuple(sorted(found, key=lambda pair: -pair[1]))


def _lengths(value: Mapping[str, Any]) -> list[Lengths]:
    return [
        Lengths(part, *(number(inner.get(column)) for column in _LENGTH_COLUMNS))
        for part, inner in _tables(value).items()
    ]


def _without_lists(value: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found[key] = _without_lists(inner)
        elif not isinstance(inner, list):
            found[key] = inner
    return found


def _examples(value: Mapping[str, Any], *, prefix: str) -> list[Examples]:
    """Return the lists of objects, or of short lists, inside an audit, wherever they stand."""
    found: list[Examples] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            found += _examples(inner, prefix=f"{prefix}{key}.")
        elif isinstance(inner, list) and inner:
            cases = [tuple(flat(row)) for row in rows(inner)]
            cases = cases or [(("", ", ".join(map(str, c)) if isinstance(c, list) else str(c)),) for c in inner]
            found.append(Examples(f"{prefix}{key}", tuple(cases[:_MAX_EXAMPLES]), max(0, len(cases) - _MAX_EXAMPLES)))
    return found
