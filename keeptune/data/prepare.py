"""Sources arrive; records by split leave, with the audit that accounts for every row."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from keeptune.data.audit import (
    MAX_EXAMPLES,
    Audit,
    DroppedRow,
    GroupAudit,
    LeakExample,
    NearAudit,
    NearPair,
    leak_audits,
    split_counts,
)
from keeptune.data.clean import NearDuplicates, exact_key, near_duplicates, prompt_key
from keeptune.data.formats import Reason, RowProblem, to_record
from keeptune.data.lines import Problem
from keeptune.data.paths import shown_path
from keeptune.data.record import SPLIT_NAMES, Record, SplitName
from keeptune.data.source import read_rows
from keeptune.data.split import Leak, LeakKind, assign_splits, find_leaks
from keeptune.errors import DataError
from keeptune.progress import Progress

_MAX_LISTED = 10
_ROWS_PER_REPORT = 1000
# Records that keeptune may cap, deduplicate and carve: those of no own validation or test file.
_TRAIN_SIDE = (None, "train")
_REMOVED_KINDS: frozenset[LeakKind] = frozenset({"exact", "near", "ngram_cover"})


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
    columns: Mapping[str, str] | None = None
    instruction: str | Sequence[str] | None = None
    max_records: int | None = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Prepared:
    """The records of each split, in the order of their sources, the audit, and the groups of untrained tasks.

    `groups` names the group of each record that is scored only, by its id: no part of a suite may share one.
    """

    records: Mapping[SplitName, Sequence[Record]]
    audit: Audit
    groups: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A record, and the split of the own file that it comes from."""

    record: Record
    fixed: SplitName | None


class _Ledger:
    """What was read and dropped so far."""

    def __init__(self) -> None:
        self.rows_in = 0
        self.dropped: Counter[str] = Counter()
        self.dropped_rows: list[DroppedRow] = []
        self.problems: list[str] = []
        self.num_problems = 0
        # One problem a source of which no row has the columns that it needs: to drop them all is no remedy.
        self.hopeless: list[str] = []

    def drop(self, origin: str, *, reason: str) -> None:
        """Count a row as dropped; the first 20 of each reason are listed."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= MAX_EXAMPLES:
            self.dropped_rows.append(DroppedRow(origin, reason))

    def drop_invalid(self, origin: str, *, reason: Reason, problem: str) -> None:
        """Count a row that is no valid record; the problems of the first 10 are listed."""
        self.drop(origin, reason=reason)
        self.num_problems += 1
        if len(self.problems) < _MAX_LISTED:
            self.problems.append(problem)

    def mark(self) -> _Mark:
        """Return how far the ledger is written."""
        return _Mark(self.rows_in, len(self.problems), self.num_problems)

    def give_up(self, problem: str, *, since: _Mark) -> None:
        """Put one problem of a whole source in the place of those of its rows."""
        self.hopeless.append(problem)
        del self.problems[since.num_listed :]
        self.num_problems = since.num_problems


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far a ledger was written."""

    rows_in: int
    num_listed: int
    num_problems: int


def prepare_records(
    sources: Sequence[TaskSource],
    *,
    seed: int,
    validation_fraction: float,
    test_fraction: float,
    drop_incomplete: bool,
    duplicates: Literal["drop", "keep"],
    leaks: Literal["drop", "keep"],
    progress: Progress,
) -> Prepared:
    """Read, cap, deduplicate and split the records, and remove train records that overlap with held-out ones.

    Records of own validation and test files are neither capped nor deduplicated. Those of a task that is not trained
    on are for test alone, and what its own test file makes needless is dropped as `not_trained`. Which records are
    kept, and in which split, depends on their content and the seed, never on the order of the rows.

    Raises:
        DataError: a source cannot be read, no record is left, or rows are no valid records and `drop_incomplete` is
            False.
    """
    ledger = _Ledger()
    placed = _read(sources, drop_incomplete=drop_incomplete, ledger=ledger, progress=progress)
    placed, num_copies = _without_copies(placed, duplicates=duplicates, ledger=ledger)
    records = [entry.record for entry in placed]
    progress.start("Auditing for near-duplicates", total=len(records), unit="records")
    near = near_duplicates([record.prompt for record in records], tasks=[record.task for record in records])
    progress.advance(len(records))
    assigned = assign_splits(
        records,
        near=near,
        fixed=[entry.fixed for entry in placed],
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    progress.start("Auditing for overlaps", total=len(records), unit="records")
    found = find_leaks(records, splits=assigned.splits, near=near)
    progress.advance(len(records))
    progress.finish()
    removed = _REMOVED_KINDS if leaks == "drop" else frozenset[LeakKind]()
    kept = _kept(records, assigned.splits, leaking={leak.train_id for leak in found if leak.kind in removed}, to=ledger)
    placed_tasks: list[tuple[str, SplitName]] = [
        (record.task, split) for split in SPLIT_NAMES for record in kept[split]
    ]
    audit = Audit(
        rows_in=ledger.rows_in,
        kept=len(placed_tasks),
        dropped=dict(ledger.dropped),
        dropped_rows=tuple(ledger.dropped_rows),
        exact_duplicates=num_copies,
        near_duplicates=_near_audit(records, near=near),
        groups=GroupAudit(
            assigned.num_groups, assigned.num_joined, assigned.num_moved, largest_group=assigned.largest_group
        ),
        tasks=split_counts(placed_tasks, tasks=[source.name for source in sources]),
        untrained_tasks=tuple(source.name for source in sources if not source.trained),
        leaks=leak_audits(_leak_examples(found, records, splits=assigned.splits), removed=removed),
    )
    untrained = set(audit.untrained_tasks)
    grouped = zip(records, assigned.groups, strict=True)
    return Prepared(kept, audit, groups={record.id: group for record, group in grouped if record.task in untrained})


def _read(
    sources: Sequence[TaskSource], *, drop_incomplete: bool, ledger: _Ledger, progress: Progress
) -> list[_Placed]:
    placed: list[_Placed] = []
    progress.start("Reading", total=len(sources), unit="tasks")
    for source in sources:
        placed += _chosen(_valid(source, ledger=ledger, progress=progress), source, ledger=ledger)
        progress.advance(note=f"{ledger.rows_in:,} rows")
    progress.finish()
    if (ledger.problems or ledger.hopeless) and not drop_incomplete:
        more = ledger.num_problems - len(ledger.problems)
        listed = [*ledger.hopeless, *ledger.problems, *([f"and {more} more."] if more else [])]
        remedy = ["To drop and count such rows, set data.drop_incomplete=true."] if ledger.problems else []
        raise DataError("\n".join([*listed, *remedy]))
    if not placed:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in ledger.dropped.items())
        raise DataError(
            f"data.tasks: found no valid record in {ledger.rows_in:,} rows ({reasons}); expected at least one. "
            "Mend the rows, or name their columns with `columns` in the task."
        )
    return placed


def _valid(source: TaskSource, *, ledger: _Ledger, progress: Progress) -> Iterator[_Placed]:
    """Yield the valid records of a source; count every row, and drop and note the others."""

    def skip(problem: Problem) -> None:
        ledger.rows_in += 1
        ledger.drop_invalid(problem.origin, reason="unreadable", problem=problem.message)

    before, first, num_unknown = ledger.mark(), "", 0
    rows = read_rows(source.path, revision=source.revision, validation=source.validation, test=source.test, skip=skip)
    for row in rows:
        ledger.rows_in += 1
        if ledger.rows_in % _ROWS_PER_REPORT == 0:
            progress.advance(0, note=f"{ledger.rows_in:,} rows")
        try:
            record = to_record(row, task=source.name, columns=source.columns, instruction=source.instruction)
        except RowProblem as problem:
            ledger.drop_invalid(row.origin, reason=problem.reason, problem=str(problem))
            if problem.reason == "unknown_format":
                num_unknown += 1
                first = first or str(problem).removeprefix(f"{row.origin}: ")
            continue
        yield _Placed(record, row.split)
    if num_unknown > 1 and num_unknown == ledger.rows_in - before.rows_in:
        ledger.give_up(f"{shown_path(source.path)}, all {num_unknown:,} rows (here the first): {first}", since=before)


def _chosen(entries: Iterable[_Placed], source: TaskSource, *, ledger: _Ledger) -> list[_Placed]:
    """Return the records of a source that its cap leaves, in their order; of an untrained source, all for test."""
    test, others = _Smallest(source.max_records), _Smallest(source.max_records)
    if source.trained:
        held_out: list[tuple[int, _Placed]] = []
        for position, entry in enumerate(entries):
            if entry.fixed in _TRAIN_SIDE:
                others.add(position, entry)
            else:
                held_out.append((position, entry))
        ledger.dropped.update(others.excess)
        return [entry for _, entry in sorted([*others.kept(), *held_out], key=lambda row: row[0])]
    for position, entry in enumerate(entries):
        (test if entry.fixed == "test" else others).add(position, entry)
    chosen = test if test.num_added else others
    ledger.dropped.update(chosen.excess)
    if chosen is test and others.num_added:
        ledger.dropped["not_trained"] += others.num_added
    return [_Placed(entry.record, "test") for _, entry in chosen.kept()]


class _Smallest:
    """Of the records added, the `at_most` with the smallest ids, which are hashes; all of them where it is None."""

    def __init__(self, at_most: int | None) -> None:
        self.num_added = 0
        self._at_most = at_most
        self._ranked: list[tuple[str, int, _Placed]] = []

    def add(self, position: int, entry: _Placed) -> None:
        """Take a record in, with its place among those of its source."""
        self._ranked.append((entry.record.id, position, entry))
        self.num_added += 1
        # Cut now and then, so that a large source never stands in memory as a whole.
        if self._at_most is not None and len(self._ranked) >= 2 * self._at_most + 1000:
            self._cut(self._at_most)

    def kept(self) -> list[tuple[int, _Placed]]:
        """Return the records that stay, in their order, each with its place."""
        if self._at_most is not None:
            self._cut(self._at_most)
        return sorted(((position, entry) for _, position, entry in self._ranked), key=lambda row: row[0])

    @property
    def excess(self) -> dict[str, int]:
        """The number of records above the cap, under the reason that they are dropped for."""
        number = 0 if self._at_most is None else self.num_added - self._at_most
        return {"max_records": number} if number > 0 else {}

    def _cut(self, at_most: int) -> None:
        self._ranked = heapq.nsmallest(at_most, self._ranked, key=lambda row: row[:2])


def _without_copies(
    placed: Sequence[_Placed], *, duplicates: Literal["drop", "keep"], ledger: _Ledger
) -> tuple[list[_Placed], int]:
    """Return the records without copies inside their task, and the number of copies; the smallest id of equals stays.

    Records of own validation and test files stay as they are.
    """
    chosen: dict[tuple[str, str], int] = {}
    keys = [(entry.record.task, exact_key(entry.record)) for entry in placed]
    for i, (entry, key) in enumerate(zip(placed, keys, strict=True)):
        if entry.fixed in _TRAIN_SIDE and entry.record.id < placed[chosen.setdefault(key, i)].record.id:
            chosen[key] = i
    copies = [i for i, entry in enumerate(placed) if entry.fixed in _TRAIN_SIDE and chosen[keys[i]] != i]
    if duplicates == "keep":
        return list(placed), len(copies)
    for i in copies:
        ledger.drop(placed[i].record.origin, reason="exact_duplicate")
    dropped = set(copies)
    return [entry for i, entry in enumerate(placed) if i not in dropped], len(copies)


def _kept(
    records: Sequence[Record], splits: Sequence[SplitName], *, leaking: set[str], to: _Ledger
) -> dict[SplitName, list[Record]]:
    """Return the records of each split; train records that leak are dropped and counted in the ledger `to`."""
    kept: dict[SplitName, list[Record]] = {split: [] for split in SPLIT_NAMES}
    for record, split in zip(records, splits, strict=True):
        if split == "train" and record.id in leaking:
            to.drop(record.origin, reason="leak")
        else:
            kept[split].append(record)
    return kept


def _near_audit(records: Sequence[Record], *, near: NearDuplicates) -> NearAudit:
    """Return the links between different prompts; those between equal ones are no near-duplicates."""
    links = [
        NearPair(records[i].origin, records[j].origin, similarity)
        for (i, j), similarity in zip(near.pairs, near.similarities, strict=True)
        if prompt_key(records[i]) != prompt_key(records[j])
    ]
    return NearAudit(len(links), tuple(links[:MAX_EXAMPLES]))


def _leak_examples(
    found: Sequence[Leak], records: Sequence[Record], *, splits: Sequence[SplitName]
) -> Iterator[tuple[LeakKind, LeakExample]]:
    # A copy of a test record in train has its id, so that an id names a record only together with its split.
    origins: dict[tuple[str, SplitName], str] = {}
    for record, split in zip(records, splits, strict=True):
        origins.setdefault((record.id, split), record.origin)
    for leak in found:
        train, held_out = origins[leak.train_id, "train"], origins[leak.held_out_id, leak.split]
        yield leak.kind, LeakExample(train, held_out, leak.split, leak.overlap_fraction)
