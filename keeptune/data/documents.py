"""A source of general text arrives; documents leave as records of a completion alone, apart from what is trained on."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keeptune.data.clean import digest, first_of_equals, key_numbers, near_duplicates
from keeptune.data.leaks import LEAK_KINDS, find_leaks
from keeptune.data.lines import Problem, decoded, json_kind, read_lines
from keeptune.data.ngrams import normalised
from keeptune.data.on_demand import OnDemand
from keeptune.data.record import SPLIT_NAMES, Message, PartName, Record, SplitName, record_id
from keeptune.data.source import Row, read_rows
from keeptune.data.split import TRAIN, part_name
from keeptune.errors import DataError, raise_collected

_COLUMN = "text"


@dataclass(frozen=True, slots=True)
class Documents:
    """A suite's documents by part ("test" is reported on), and what became of every document that was read.

    `num_read` = the sum over parts + the sum of `dropped`, by reason.
    """

    parts: Mapping[PartName | SplitName, Sequence[Record]]
    num_read: int
    dropped: Mapping[str, int]


def read_documents(path: str, *, suite: str, max_records: int) -> tuple[list[Record], Counter[str], int]:
    """Return at most `max_records` different documents, how many were dropped and why, and how many were read.

    Which are kept depends on their content alone: those with the smallest ids, which are hashes.

    Raises:
        DataError: there is no such source, a row has no text, or no document is left.
    """
    dropped: Counter[str] = Counter()
    found: dict[str, Record] = {}
    num_read = 0
    for record in _documents(path, suite=suite):
        num_read += 1
        if not record.completion.strip():
            dropped["empty"] += 1
        elif record.id in found:
            dropped["exact_duplicate"] += 1
        else:
            found[record.id] = record
    kept = heapq.nsmallest(max_records, found.values(), key=lambda record: record.id)
    if len(found) > len(kept):
        dropped["max_records"] = len(found) - len(kept)
    if not kept:
        raise DataError(f"{path}: found no text in {num_read:,} documents; expected at least one. Name another source.")
    return kept, dropped, num_read


def place_documents(
    documents: Sequence[Record],
    *,
    train: Sequence[Record],
    seed: int,
    shares: Mapping[PartName, float],
    dropped: Counter[str],
    num_read: int,
) -> Documents:
    """Drop documents that overlap with train prompts or completions, and divide the rest by near-duplicate groups."""
    leaking = _overlapping(documents, train=train)
    kept = [document for document in documents if document.id not in leaking]
    if leaking:
        dropped = dropped + Counter(leak=len(leaking))
    groups = near_duplicates([document.completion for document in kept]).groups
    # A group's name is its smallest id, so that no document moves when unrelated ones come.
    smallest: dict[int, str] = {}
    for document, group in zip(kept, groups.tolist(), strict=True):
        smallest[group] = min(smallest.get(group, document.id), document.id)
    parts: dict[PartName | SplitName, list[Record]] = {part: [] for part in (*shares, "test")}
    for document, group in zip(kept, groups.tolist(), strict=True):
        parts[part_name(smallest[group], seed=seed, shares=shares) or "test"].append(document)
    return Documents(parts, num_read, dropped)


def _overlapping(documents: Sequence[Record], *, train: Sequence[Record]) -> set[str]:
    """Return the ids of documents that hold, or are held by, a train prompt or completion.

    The check is that of test against train: each side's texts stand in as prompts. A train record names one document
    at a time, so it is asked again until it names none.
    """
    leaking: set[str] = set()
    while True:
        left = [document for document in documents if document.id not in leaking]
        records = _AsPrompts(train, left)
        keys = key_numbers(b"".join(digest(normalised(record.prompt)) for record in records))
        splits = np.full(len(records), TRAIN, np.int8)
        splits[len(records) - len(left) :] = SPLIT_NAMES.index("test")
        # Near-duplicates of more than a few words cover each other's runs of words: they need no search of their own.
        leaks = find_leaks(records, keys=keys, groups=first_of_equals(keys), splits=splits)
        found = leaks.held_out[leaks.kinds != LEAK_KINDS.index("ngram_13")]
        if not len(found):
            return leaking
        leaking |= {records[int(i)].id for i in found}


class _AsPrompts(OnDemand[Record]):
    """Prompts and completions of train records, then documents, each as the prompt of a record of its own."""

    def __init__(self, train: Sequence[Record], documents: Sequence[Record]) -> None:
        self._train, self._documents = train, documents

    def __len__(self) -> int:
        return 2 * len(self._train) + len(self._documents)

    def _entry(self, index: int) -> Record:
        place = index - 2 * len(self._train)
        if place >= 0:
            return _as_prompt(self._documents[place], self._documents[place].completion)
        record = self._train[index // 2]
        return _as_prompt(record, record.completion if index % 2 else record.prompt)


def _as_prompt(record: Record, text: str) -> Record:
    return replace(record, messages=(Message("user", text), Message("assistant", "")))


def _documents(path: str, *, suite: str) -> Iterator[Record]:
    if Path(path).suffix == ".txt":
        rows = _paragraphs(Path(path).expanduser(), shown=path)
    else:
        rows = _column(read_rows(path, revision=None, validation=None, test=None), path=path)
    for text, origin in rows:
        messages = (Message("assistant", text),)
        yield Record(record_id(suite, messages), suite, origin, messages)


def _column(rows: Iterator[Row], *, path: str) -> Iterator[tuple[str, str]]:
    problems: list[str] = []
    for row in rows:
        text = row.value.get(_COLUMN)
        if isinstance(text, str):
            yield text, row.origin
        else:
            found = json_kind(text) if _COLUMN in row.value else f"the columns {', '.join(sorted(row.value))[:200]}"
            problems.append(f"{row.origin}: found {found}; expected text in the column {_COLUMN!r}. Fix or rename it.")
    if problems:
        raise_collected(DataError, problems)


def _paragraphs(path: Path, *, shown: str) -> Iterator[tuple[str, str]]:
    """Yield the runs of lines between blank ones, each with the place of its first line."""
    if not path.is_file():
        raise DataError(f"{shown}: found no such file; expected a text file. Check the path.")
    lines: list[str] = []
    first = 0
    for line in read_lines(path, shown=shown):
        text = decoded(line, shown=shown)
        if isinstance(text, Problem):
            raise DataError(text.message)
        if text.strip():
            first = first if lines else line.number
            lines.append(text.rstrip("\r\n"))
        elif lines:
            yield "\n".join(lines), f"{shown}:{first}"
            lines = []
    if lines:
        yield "\n".join(lines), f"{shown}:{first}"
