"""`data/audit.json` arrives; what was read, dropped, found twice, leaked and measured leaves, in the page's order.

A count that this module does not know by name still reaches the page, under its own name: an audit hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.data.record import SPLIT_NAMES
from keeptune.report.reading import RunFolder, flat, mapping, number, rows, strings, whole

_MAX_EXAMPLES = 6
_LENGTH_COLUMNS = ("p50", "p90", "p99", "max", "mean")
_PARTS = {
    "prompt": "prompt",
    "completion": "completion",
    "total": "total",
    "untrained_completion": "completion, tasks not trained on",
}
_SHOWN = frozenset({"rows_in", "kept", "kept_whole", "truncated", "dropped", "tasks", "splits", "leaks", "tokens"})
_SHOWN |= {"untrained_tasks", "parts", "references", "remarks", "unread_columns"}
_LEAKS = {
    "exact": "Same prompt",
    "near": "Near-duplicate prompt",
    "ngram_cover": "More than half in common runs of 8 words",
    "ngram_13": "No more than a common run of 13 words (no leak)",
}
Counts = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """How many records of a task stand in each split."""

    task: str
    train: int
    validation: int
    test: int


@dataclass(frozen=True, slots=True)
class Parts:
    """How many test records of a task no score is from: for a search, for the certificate, or trained on again."""

    task: str
    probe: int
    certify: int
    replay: int


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
class Leak:
    """Train records that overlap with validation or test in one way, and how many of them were removed."""

    kind: str
    label: str
    num_train_records: int | None
    num_removed: int | None


@dataclass(frozen=True, slots=True)
class Examples:
    """Cases that the audit shows, each as (field, value); `num_more` of them stand in `audit.json` alone."""

    title: str
    cases: tuple[tuple[tuple[str, str], ...], ...]
    num_more: int


@dataclass(frozen=True, slots=True)
class Audit:
    """`rows_in` = `kept` + the sum of `dropped`; `truncated` of the kept lost tokens to the limit of length.

    The tasks in `untrained_tasks` are scored only. `remarks` are sentences on what a user should know.
    """

    rows_in: int | None
    kept: int | None
    truncated: int | None
    dropped: Counts
    splits: tuple[SplitCounts, ...]
    parts: tuple[Parts, ...]
    leaks: tuple[Leak, ...]
    lengths: tuple[Lengths, ...]
    other: tuple[tuple[str, str], ...]
    examples: tuple[Examples, ...]
    untrained_tasks: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to show."""
        return self.rows_in is None and not self.splits and not self.other

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """The tasks that were trained on."""
        return tuple(split.task for split in self.splits if split.task not in self.untrained_tasks)

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
    tokens, leaks = mapping(value.get("tokens")), mapping(value.get("leaks"))
    rest = {key: inner for key, inner in value.items() if key not in _SHOWN}
    rest |= {"tokens": {key: inner for key, inner in tokens.items() if key not in {*_PARTS, "truncated", "too_long"}}}
    return Audit(
        rows_in=whole(value.get("rows_in")),
        kept=whole(value.get("kept")),
        truncated=whole(value.get("truncated")),
        dropped=_counts(value.get("dropped")),
        splits=tuple(_splits(mapping(value.get("tasks")))),
        parts=tuple(_parts(mapping(value.get("parts")))),
        leaks=tuple(_leak(kind, mapping(inner)) for kind, inner in leaks.items()),
        lengths=tuple(_lengths(tokens)),
        other=tuple(flat(_without_lists(rest))),
        examples=tuple([*_examples(rest, prefix=""), *_examples(leaks, prefix="leaks.")]),
        untrained_tasks=strings(value.get("untrained_tasks")),
        remarks=strings(value.get("remarks")),
    )


def _splits(tasks: Mapping[str, Any]) -> Iterator[SplitCounts]:
    for task, counts in tasks.items():
        train, validation, test = (whole(mapping(counts).get(split)) or 0 for split in SPLIT_NAMES)
        yield SplitCounts(task, train, validation, test)


def _parts(tasks: Mapping[str, Any]) -> Iterator[Parts]:
    for task, counts in tasks.items():
        probe, certify, replay = (whole(mapping(counts).get(part)) or 0 for part in ("probe", "certify", "replay"))
        yield Parts(task, probe, certify, replay)


def _counts(value: Any) -> Counts:
    """Return (name, count), the largest first."""
    found = [(name, number) for name, inner in mapping(value).items() if (number := whole(inner)) is not None]
    return tuple(sorted(found, key=lambda pair: -pair[1]))


def _leak(kind: str, value: Mapping[str, Any]) -> Leak:
    return Leak(kind, _LEAKS.get(kind, kind), whole(value.get("num_train_records")), whole(value.get("num_removed")))


def _lengths(tokens: Mapping[str, Any]) -> Iterator[Lengths]:
    for part, label in _PARTS.items():
        if isinstance(value := tokens.get(part), dict):
            p50, p90, p99, largest, mean = (number(value.get(column)) for column in _LENGTH_COLUMNS)
            yield Lengths(label, p50, p90, p99, largest, mean)


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
