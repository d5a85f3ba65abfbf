"""Sources arrive; their valid records leave into one file, a few numbers of each stay; other rows are counted."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keeptune.data.audit import DroppedRow
from keeptune.data.clean import digest, key_numbers
from keeptune.data.columns import Columns, Labels, unread_columns
from keeptune.data.disk import DiskArray, RecordFile, Records
from keeptune.data.formats import columns_read, to_record
from keeptune.data.labels import LabelCounts
from keeptune.data.leak_audit import MAX_EXAMPLES
from keeptune.data.lines import Problem
from keeptune.data.messages import Reason, RowProblem, unread_fields
from keeptune.data.ngrams import Hashes, Indices, normalised
from keeptune.data.paths import shown_path
from keeptune.data.record import SPLIT_NAMES, Record, SplitName
from keeptune.data.source import Row, read_rows
from keeptune.data.split import NO_SPLIT, TRAIN, SplitNumbers
from keeptune.errors import Complaints, DataError
from keeptune.progress import Progress

_MAX_COLUMNS = 100
_ROWS_PER_REPORT = 1000


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Where a task's rows come from, how they are read, and how many records are kept at most.

    Of a task that is not `trained` on, every record is a test record; `max_records` caps those.
    """

    name: str
    path: str | Sequence[str]
    revision: str | None = None
    validation: str | None = None
    test: str | None = None
    config: str | None = None
    split: str | None = None
    columns: Columns | None = None
    labels: Labels | None = None
    ignore: Sequence[str] | None = None
    instruction: str | Sequence[str] | None = None
    max_records: int | None = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Placed:
    """Records on the disk, and of each its id as a number, its source, and the split of the own file it comes from.

    `prompt_keys`, (number of records, 2), are those of `prompt_key`.
    """

    records: Records
    ids: NDArray[np.uint64]
    prompt_keys: Hashes
    tasks: NDArray[np.int32]
    fixed: SplitNumbers

    def at(self, kept: NDArray[np.bool_]) -> Placed:
        """Return the records that are marked as true."""
        records, tasks, fixed = self.records.at(kept), self.tasks[kept], self.fixed[kept]
        return Placed(records, self.ids[kept], self.prompt_keys[kept], tasks=tasks, fixed=fixed)

    @property
    def in_train_side(self) -> NDArray[np.bool_]:
        """The records that keeptune may cap, deduplicate and carve: those of no own validation or test file."""
        return (self.fixed == NO_SPLIT) | (self.fixed == TRAIN)


class Ledger:
    """What was read and dropped so far."""

    def __init__(self) -> None:
        self.rows_in = 0
        self.dropped: Counter[str] = Counter()
        self.dropped_rows: list[DroppedRow] = []
        self.problems: list[str] = []
        # Those of sources of which no row is a record: to drop them all is no remedy.
        self.hopeless: list[str] = []
        # Columns that no record is made of, by task, and in how many rows they carry something.
        self.unread: dict[str, Counter[str]] = {}
        self.labels: dict[str, LabelCounts] = {}
        self.remarks: list[str] = []

    def drop(self, origin: str, *, reason: str) -> None:
        """Count a row as dropped; the first 20 of each reason are listed."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= MAX_EXAMPLES:
            self.dropped_rows.append(DroppedRow(origin, reason))

    def drop_records(self, records: Records, *, reason: str) -> None:
        """Count records as dropped, for a reason of which none was counted yet."""
        if len(records):
            self.dropped_rows += [DroppedRow(record.origin, reason) for record in records[:MAX_EXAMPLES]]
            self.dropped[reason] = len(records)

    def note_columns(self, task: str, columns: Sequence[str]) -> None:
        """Count columns of a row that were not read; of a task, the first 100 different ones."""
        counts = self.unread.setdefault(task, Counter())
        counts.update(column for column in columns if column in counts or len(counts) < _MAX_COLUMNS)


class _Smallest:
    """Of the records offered, the `at_most` with the smallest ids, which are hashes; all of them where it is None."""

    def __init__(self, at_most: int | None) -> None:
        self.num_offered = 0
        self._at_most = at_most
        self._ids, self._rows = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._new_ids, self._new_rows = array("Q"), array("q")
        self._largest = 1 << 64

    def wants(self, id_: int) -> bool:
        """Count a record that is offered; tell whether it may be among those that stay."""
        self.num_offered += 1
        return id_ <= self._largest

    def add(self, id_: int, row: int) -> None:
        """Take in a record that is wanted, and where it lies."""
        self._new_ids.append(id_)
        self._new_rows.append(row)
        # Cut now and then, so that little more than what stays is ever written.
        if self._at_most is not None and len(self._new_ids) > self._at_most + 1000:
            self._merge()

    def kept(self) -> Indices:
        """Return where the records lie that stay, in their order."""
        self._merge()
        return np.sort(self._rows)

    @property
    def excess(self) -> dict[str, int]:
        """The number of records above the cap, under the reason that they are dropped for."""
        number = 0 if self._at_most is None else self.num_offered - self._at_most
        return {"max_records": number} if number > 0 else {}

    def _merge(self) -> None:
        self._ids = np.concatenate([self._ids, np.array(self._new_ids, np.uint64)])
        self._rows = np.concatenate([self._rows, np.array(self._new_rows, np.int64)])
        self._new_ids, self._new_rows = array("Q"), array("q")
        if self._at_most is not None and len(self._ids) > self._at_most:
            smallest = np.lexsort((self._rows, self._ids))[: self._at_most]
            self._ids, self._rows = self._ids[smallest], self._rows[smallest]
            self._largest = int(self._ids[-1])


class _Store:
    """Records as they are read, row by row."""

    def __init__(self, scratch: Path) -> None:
        self.file = RecordFile(scratch / "records.jsonl")
        self.prompt_keys = DiskArray(scratch / "prompt-keys", np.uint8)
        self.whole_keys = DiskArray(scratch / "whole-keys", np.uint8)
        self.ids = array("Q")
        self.fixed = array("b")

    def offer(self, record: Record, *, split: SplitName | None, to: _Smallest) -> None:
        """Write a record if its side wants it."""
        id_ = int(record.id, 16)
        if to.wants(id_):
            self.ids.append(id_)
            self.fixed.append(int(NO_SPLIT) if split is None else SPLIT_NAMES.index(split))
            prompt = normalised(record.prompt)
            self.prompt_keys.append(digest(prompt))
            self.whole_keys.append(digest(f"{prompt}\0{normalised(record.completion)}"))
            to.add(id_, self.file.append(record))


def read_sources(
    sources: Sequence[TaskSource], *, drop_incomplete: bool, ledger: Ledger, progress: Progress, scratch: Path
) -> tuple[Placed, Hashes]:
    """Read the sources and write their records into `scratch`; what is dropped is counted in the ledger.

    Beside the records come the keys of `exact_key`, (number of records, 2).

    A source's cap keeps the records with the smallest ids. Those of own validation and test files are not capped. Of a
    task that is not trained on, every record is for test, and what its own test file makes needless is dropped as
    `not_trained`.

    Raises:
        DataError: a source cannot be read, no record is left, or rows are no valid records and `drop_incomplete` is
            False.
    """
    store = _Store(scratch)
    names: dict[str, int] = {}
    rows, tasks = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    progress.start("Reading", total=len(sources), unit="tasks")
    for source in sources:
        entries = _valid(source, ledger=ledger, progress=progress)
        rows.append(_stored(entries, source, store=store, ledger=ledger))
        tasks.append(np.full(len(rows[-1]), names.setdefault(source.name, len(names)), np.int32))
        progress.advance(note=f"{ledger.rows_in:,} rows")
    progress.finish()
    if ledger.hopeless or (ledger.problems and not drop_incomplete):
        remedy = (
            ["To drop and count such rows, set data.drop_incomplete=true."] if ledger.problems and store.ids else []
        )
        raise DataError("\n".join([*ledger.hopeless, *([] if drop_incomplete else ledger.problems + remedy)]))
    chosen = np.concatenate(rows)
    if not len(chosen):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in ledger.dropped.items())
        raise DataError(
            f"data.tasks: found no valid record in {ledger.rows_in:,} rows ({reasons}); expected at least one. "
            "Fix the rows, or name their columns with `columns` in the task."
        )
    placed = Placed(
        Records(store.file, chosen),
        ids=np.array(store.ids, np.uint64)[chosen],
        prompt_keys=key_numbers(store.prompt_keys.whole())[chosen],
        tasks=np.concatenate(tasks),
        fixed=np.array(store.fixed, np.int8)[chosen],
    )
    return placed, key_numbers(store.whole_keys.whole())[chosen]


def _stored(
    entries: Iterator[tuple[Record, SplitName | None]], source: TaskSource, *, store: _Store, ledger: Ledger
) -> Indices:
    """Write the records of a source; return the rows of those that its cap leaves, in their order."""
    test, others = _Smallest(source.max_records), _Smallest(source.max_records)
    if source.trained:
        held_out = _Smallest(None)
        for record, split in entries:
            store.offer(record, split=split, to=others if split in (None, "train") else held_out)
        ledger.dropped.update(others.excess)
        return np.sort(np.concatenate([others.kept(), held_out.kept()]))
    for record, split in entries:
        store.offer(record, split="test", to=test if split == "test" else others)
    chosen = test if test.num_offered else others
    ledger.dropped.update(chosen.excess)
    if chosen is test and others.num_offered:
        ledger.dropped["not_trained"] += others.num_offered
    return chosen.kept()


def _valid(source: TaskSource, *, ledger: Ledger, progress: Progress) -> Iterator[tuple[Record, SplitName | None]]:
    """Yield the valid records of a source, each with its own file's split; count all rows, drop and note the others."""
    complaints = Complaints()

    def drop(origin: str, *, reason: Reason, problem: str) -> None:
        ledger.drop(origin, reason=reason)
        complaints.add(problem)

    def skip(problem: Problem) -> None:
        ledger.rows_in += 1
        drop(problem.origin, reason="unreadable", problem=problem.message)

    before, num_valid = ledger.rows_in, 0
    ignored = source.ignore or ()
    form = {"columns": source.columns, "labels": source.labels, "ignore": ignored}
    for row in _rows(source, skip=skip, say=ledger.remarks.append):
        ledger.rows_in += 1
        if ledger.rows_in % _ROWS_PER_REPORT == 0:
            progress.advance(0, note=f"{ledger.rows_in:,} rows")
        try:
            record = to_record(row, task=source.name, instruction=source.instruction, **form)
        except RowProblem as problem:
            drop(row.origin, reason=problem.reason, problem=str(problem))
            continue
        num_valid += 1
        read = columns_read(row.value, source.columns)
        columns = unread_columns(row.value, read=read, ignored=ignored)
        ledger.note_columns(source.name, [*columns, *sorted(unread_fields(row.value, columns=read))])
        ledger.labels.setdefault(source.name, LabelCounts()).add(record.completion)
        yield record, row.split
    num_rows = ledger.rows_in - before
    if not num_valid and num_rows > 1:
        ledger.hopeless += _of_all(complaints, source, num_rows=num_rows)
    else:
        ledger.problems += complaints.lines()


def _rows(source: TaskSource, *, skip: Callable[[Problem], None], say: Callable[[str], None]) -> Iterator[Row]:
    return read_rows(
        source.path,
        revision=source.revision,
        validation=source.validation,
        test=source.test,
        config=source.config,
        split=source.split,
        max_records=source.max_records,
        skip=skip,
        say=say,
    )


def _of_all(complaints: Complaints, source: TaskSource, *, num_rows: int) -> list[str]:
    """Return what is wrong with a source of which no row is a record."""
    if complaints.only is None:
        return complaints.lines()
    _, _, found = complaints.only.partition(": found")
    return [f"{shown_path(source.path)}, all {num_rows:,} rows (here the first): found{found}"]
