"""Sources arrive; records by split leave, with the audit that accounts for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from keeptune.data.formats import RowProblem, to_record
from keeptune.data.record import SPLIT_NAMES, Record, SplitName
from keeptune.data.source import read_rows
from keeptune.data.split import Assigned, Leak, LeakKind, assign_splits, find_leaks
from keeptune.errors import DataError
from keeptune.progress import Progress

_MAX_LISTED = 10
_REMOVED_KINDS: frozenset[LeakKind] = frozenset({"exact", "near", "ngram_cover"})


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Where a task's rows come from, how they are read, and how many records are kept at most."""

    name: str
    path: str
    revision: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: Mapping[str, str] | None = None
    instruction: str | None = None
    max_records: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The records of each split, in the order of their sources, and the audit."""

    records: Mapping[SplitName, Sequence[Record]]
    audit: Audit


@dataclass(frozen=True, slots=True)
class _Placed:
    """A record, and the split of the own file that it comes from."""

    record: Record
    fixed: SplitName | None


@dataclass(slots=True)
class _Ledger:
    """What was read and dropped so far."""

    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_rows: list[DroppedRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def drop(self, origin: str, *, reason: str) -> None:
        """Count a row as dropped; the first 20 are listed."""
        self.dropped[reason] += 1
        if len(self.dropped_rows) < MAX_EXAMPLES:
            self.dropped_rows.append(DroppedRow(origin, reason))


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

    Records of own validation and test files are neither capped nor deduplicated. Which records are kept, and in which
    split, depends on their content and the seed, never on the order of the rows.

    Raises:
        DataError: a source cannot be read, or rows are no valid records and `drop_incomplete` is False.
    """
    ledger = _Ledger()
    placed: list[_Placed] = []
    progress.start("Reading", total=len(sources), unit="tasks")
    for source in sources:
        placed += _capped(_placed(source, ledger=ledger), source=source, ledger=ledger)
        progress.advance(note=f"{ledger.rows_in:,} rows")
    progress.finish()
    if ledger.problems and not drop_incomplete:
        _raise_problems(ledger)
    placed, num_duplicates = _without_copies(placed, duplicates=duplicates, ledger=ledger)
    records = [entry.record for entry in placed]
    progress.start("Auditing", total=2 * len(records), unit="records")
    near = near_duplicates([record.prompt for record in records], tasks=[record.task for record in records])
    assigned = assign_splits(
        records,
        near=near,
        fixed=[entry.fixed for entry in placed],
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    progress.advance(len(records), note="split")
    found = find_leaks(records, splits=assigned.splits, near=near)
    progress.advance(len(records), note="compared")
    progress.finish()
    removed = {leak.train_id for leak in found if leak.kind in _REMOVED_KINDS} if leaks == "drop" else set()
    kept: dict[SplitName, list[Record]] = {split: [] for split in SPLIT_NAMES}
    for record, split in zip(records, assigned.splits, strict=True):
        if split == "train" and record.id in removed:
            ledger.drop(record.origin, reason="leak")
        else:
            kept[split].append(record)
    audit = Audit(
        rows_in=ledger.rows_in,
        kept=sum(map(len, kept.values())),
        dropped=dict(ledger.dropped),
        dropped_rows=tuple(ledger.dropped_rows),
        exact_duplicates=num_duplicates,
        near_duplicates=_near_audit(records, near=near),
        groups=_group_audit(assigned),
        tasks={name: counts for name, counts in _tasks(sources, kept)},
        leaks=leak_audits(_leak_examples(found, records), removed=_REMOVED_KINDS if leaks == "drop" else frozenset()),
    )
    progress.say(audit.summary())
    return Prepared(kept, audit)
