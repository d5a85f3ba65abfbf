"""Sources arrive; records by split leave, with the audit that accounts for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from keeptune.data.audit import (
    MAX_EXAMPLES,
    Audit,
    GroupAudit,
    LeakAudit,
    LeakExample,
    NearAudit,
    NearPair,
    leak_audits,
    split_counts,
)
from keeptune.data.clean import NearDuplicates, near_duplicates
from keeptune.data.disk import Records, Texts, chosen
from keeptune.data.groups import Members
from keeptune.data.heap import gives_back_freed
from keeptune.data.leaks import LEAK_KINDS, LeakKind, Leaks, find_leaks
from keeptune.data.ngrams import Hashes, Indices
from keeptune.data.reading import Ledger, Placed, TaskSource, read_sources
from keeptune.data.record import SPLIT_NAMES, SplitName
from keeptune.data.split import SplitNumbers, assign_splits
from keeptune.progress import Progress

_REMOVED_KINDS: frozenset[LeakKind] = frozenset({"exact", "near", "ngram_cover"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """The records of each split, in the order of their sources, and the audit; the records lie in the scratch folder.

    `test_groups` (number of test records, 2) are the keys of their groups: no two parts of a suite may share one.
    """

    records: Mapping[SplitName, Records]
    audit: Audit
    test_groups: Hashes


@gives_back_freed
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
    scratch: Path,
) -> Prepared:
    """Read, cap, deduplicate and split the records, and remove train records that overlap with held-out ones.

    Records of own validation and test files are neither capped nor deduplicated. Those of a task that is not trained
    on are for test alone, and what its own test file makes needless is dropped as `not_trained`. Which records are
    kept, and in which split, depends on their content and the seed, never on the order of the rows. Texts lie in the
    folder `scratch`, which must stand for as long as the records are read; memory holds about fifty bytes of each.

    Raises:
        DataError: a source cannot be read, no record is left, or rows are no valid records and `drop_incomplete` is
            False.
        StorageError: the disk refuses.
    """
    ledger = Ledger()
    how = {"drop_incomplete": drop_incomplete, "duplicates": duplicates}
    placed, num_copies = _read_once(sources, ledger=ledger, progress=progress, scratch=scratch, **how)
    keys, num_records = placed.prompt_keys, len(placed.records)
    progress.start("Auditing for near-duplicates", total=num_records, unit="records")
    names = list(dict.fromkeys(source.name for source in sources))
    prompts = Texts(placed.records, lambda record: record.prompt)
    near = near_duplicates(prompts, tasks=[names[number] for number in placed.tasks], scratch=scratch)
    progress.advance(num_records)
    assigned = assign_splits(
        keys,
        tasks=placed.tasks,
        near=near.groups,
        fixed=placed.fixed,
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    progress.start("Auditing for overlaps", total=num_records, unit="records")
    found = find_leaks(placed.records, keys=keys, groups=assigned.groups, splits=assigned.splits, scratch=scratch)
    progress.advance(num_records)
    progress.finish()
    removed = _REMOVED_KINDS if leaks == "drop" else frozenset[LeakKind]()
    leaking = found.train[np.isin(found.kinds, [LEAK_KINDS.index(kind) for kind in removed])]
    ledger.drop_records(placed.records.at(leaking), reason="leak")
    rows = _kept_rows(assigned.splits, leaking=leaking)
    audit = Audit(
        rows_in=ledger.rows_in,
        kept=num_records - len(leaking),
        dropped=dict(ledger.dropped),
        dropped_rows=tuple(ledger.dropped_rows),
        exact_duplicates=num_copies,
        near_duplicates=_near_audit(placed.records, near=near, keys=keys),
        groups=GroupAudit(assigned.num_groups, assigned.num_joined, assigned.num_moved, assigned.largest_group),
        tasks=split_counts(
            ((names[task], split) for split, members in rows.items() for task in placed.tasks[members]), tasks=names
        ),
        untrained_tasks=tuple(source.name for source in sources if not source.trained),
        leaks=_leak_audits(found, placed, splits=assigned.splits, removed=removed),
    )
    return Prepared(
        {split: placed.records.at(members) for split, members in rows.items()},
        audit,
        test_groups=keys[assigned.groups[rows["test"]]],
    )


def _kept_rows(splits: SplitNumbers, *, leaking: Members) -> dict[SplitName, Indices]:
    """Return the records of each split, without those that leak."""
    is_kept = np.ones(len(splits), np.bool_)
    is_kept[leaking] = False
    return {split: np.flatnonzero(is_kept & (splits == i)) for i, split in enumerate(SPLIT_NAMES)}


@gives_back_freed
def _read_once(
    sources: Sequence[TaskSource],
    *,
    drop_incomplete: bool,
    duplicates: Literal["drop", "keep"],
    ledger: Ledger,
    progress: Progress,
    scratch: Path,
) -> tuple[Placed, int]:
    """Read the records without copies inside their task; return the number of copies too.

    Of equals the one with the smallest id stays. Records of own validation and test files stay as they are.
    """
    how = {"drop_incomplete": drop_incomplete, "ledger": ledger, "progress": progress, "scratch": scratch}
    placed, whole_keys = read_sources(sources, **how)
    train_side = np.flatnonzero(placed.in_train_side)
    columns = (placed.ids, whole_keys[:, 1], whole_keys[:, 0], placed.tasks)
    # Equals stand side by side, the smallest id first.
    order = train_side[np.lexsort([column[train_side] for column in columns])]
    equals_last = np.ones(max(len(order) - 1, 0), np.bool_)
    for column in columns[1:]:
        equals_last &= column[order[1:]] == column[order[:-1]]
    is_copy = np.zeros(len(placed.records), np.bool_)
    is_copy[order[1:][equals_last]] = True
    if duplicates == "drop":
        ledger.drop_records(placed.records.at(is_copy), reason="exact_duplicate")
        placed = placed.at(~is_copy)
    return placed, int(np.count_nonzero(is_copy))


def _near_audit(records: Records, *, near: NearDuplicates, keys: Hashes) -> NearAudit:
    """Return the links between different prompts; those between equal ones are no near-duplicates."""
    differ = np.flatnonzero((keys[near.pairs[:, 0]] != keys[near.pairs[:, 1]]).any(axis=1))
    shown = differ[:MAX_EXAMPLES]
    origins = [record.origin for record in chosen(records, near.pairs[shown].ravel())]
    links = zip(origins[::2], origins[1::2], near.similarities[shown].tolist(), strict=True)
    return NearAudit(len(differ), tuple(NearPair(*link) for link in links))


def _leak_audits(
    found: Leaks, placed: Placed, *, splits: SplitNumbers, removed: frozenset[LeakKind]
) -> dict[LeakKind, LeakAudit]:
    """Return the audit of each kind of overlap; listed are as many leaks as may be, by the origins of their records."""

    def origin(i: int) -> str:
        # A copy of a test record in train has its id, so that an id names a record only together with its split.
        first = np.flatnonzero((placed.ids == placed.ids[i]) & (splits == splits[i]))[:1]
        return chosen(placed.records, first)[0].origin

    counts: dict[LeakKind, int] = {}
    examples: list[tuple[LeakKind, LeakExample]] = []
    for number, kind in enumerate(LEAK_KINDS):
        of_kind = np.flatnonzero(found.kinds == number)
        counts[kind] = len(of_kind)
        for k in of_kind[:MAX_EXAMPLES]:
            train, held_out = int(found.train[k]), int(found.held_out[k])
            share = float(found.overlap_fractions[k])
            examples.append((kind, LeakExample(origin(train), origin(held_out), SPLIT_NAMES[splits[held_out]], share)))
    return leak_audits(counts, examples, removed=removed)
