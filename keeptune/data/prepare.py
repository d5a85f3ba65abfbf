"""Sources arrive; records by split leave, with the audit that accounts for every row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keeptune.data import remarks
from keeptune.data.audit import Audit, NearAudit, NearPair, split_counts
from keeptune.data.clean import NearDuplicates, near_duplicates
from keeptune.data.columns import is_label
from keeptune.data.disk import Records, Texts, chosen
from keeptune.data.group_audit import group_audit
from keeptune.data.groups import Members
from keeptune.data.heap import gives_back_freed
from keeptune.data.leak_audit import MAX_EXAMPLES, LeakAudit, LeakExample, leak_audits, shared_words
from keeptune.data.leaks import LEAK_KINDS, LeakKind, Leaks, find_leaks
from keeptune.data.ngrams import Hashes, Indices
from keeptune.data.overlaps import OverlapSearch, PairFile
from keeptune.data.reading import Ledger, Placed, TaskSource, read_sources
from keeptune.data.record import SPLIT_NAMES, Record, SplitName
from keeptune.data.split import NO_SPLIT, Assigned, SplitNumbers, assign_splits, join_inputs
from keeptune.progress import Progress

_LEAKS: tuple[LeakKind, ...] = ("exact", "near", "ngram_cover")


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
    leaks: Literal["auto", "drop", "keep"],
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
    names = list(dict.fromkeys(source.name for source in sources))
    near = _near(placed, names=names, progress=progress, scratch=scratch)
    progress.start("Auditing for overlaps", total=num_records, unit="records")
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    assigned, found = _split(placed, near=near.groups, seed=seed, scratch=scratch, **fractions)
    progress.advance(num_records)
    progress.finish()
    removed = _removed(found, placed, leaks=leaks)
    leaking = found.train[removed]
    ledger.drop_records(placed.records.at(leaking), reason="leak")
    rows = _kept_rows(assigned.splits, leaking=leaking)
    audits = _leak_audits(found, placed, splits=assigned.splits, removed=removed)
    audit = Audit(
        rows_in=ledger.rows_in,
        kept=num_records - len(leaking),
        dropped=dict(ledger.dropped),
        dropped_rows=tuple(ledger.dropped_rows),
        exact_duplicates=num_copies,
        near_duplicates=_near_audit(placed.records, near=near, keys=keys),
        groups=group_audit(assigned, placed.records, keys=keys, tasks=placed.tasks, names=names),
        tasks=split_counts(
            ((names[task], split) for split, members in rows.items() for task in placed.tasks[members]), tasks=names
        ),
        untrained_tasks=tuple(source.name for source in sources if not source.trained),
        remarks=tuple(_remarks(sources, ledger, audits, leaks=leaks, num_train=len(rows["train"]) + len(leaking))),
        unread_columns={task: dict(counts) for task, counts in ledger.unread.items() if counts},
        leaks=audits,
    )
    return Prepared(
        {split: placed.records.at(members) for split, members in rows.items()},
        audit,
        test_groups=keys[assigned.groups[rows["test"]]],
    )


def _near(placed: Placed, *, names: list[str], progress: Progress, scratch: Path) -> NearDuplicates:
    """Return which prompts are near-duplicates."""
    progress.start("Auditing for near-duplicates", total=len(placed.records), unit="records")
    prompts = Texts(placed.records, lambda record: record.prompt)
    near = near_duplicates(prompts, tasks=[names[number] for number in placed.tasks], scratch=scratch)
    progress.advance(len(placed.records))
    return near


@gives_back_freed
def _split(
    placed: Placed, *, near: Members, seed: int, validation_fraction: float, test_fraction: float, scratch: Path
) -> tuple[Assigned, Leaks]:
    """Return the splits of the records, those that share an input in one, and what train and the rest still share."""
    keys, everything = placed.prompt_keys, np.ones(len(placed.records), np.bool_)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="overlaps-") as folder:
        search = OverlapSearch(placed.records, groups=near, scratch=Path(folder))
        covers = PairFile(search.covers(items=everything, covering=everything), scratch=Path(folder))
        assigned = assign_splits(
            keys,
            tasks=placed.tasks,
            near=join_inputs(near, ((pairs.items, pairs.covering) for pairs in covers), keys=keys),
            fixed=placed.fixed,
            seed=seed,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
        )
        known = {"search": search, "covers": covers, "scratch": Path(folder)}
        return assigned, find_leaks(placed.records, keys=keys, groups=near, splits=assigned.splits, **known)


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


def _removed(found: Leaks, placed: Placed, *, leaks: Literal["auto", "drop", "keep"]) -> NDArray[np.bool_]:
    """Tell of each leak whether its train record is removed.

    With `auto`, a record stays whose task brings along the file that holds the other: how these files divide the data
    was chosen by whoever made them.
    """
    is_leak = np.isin(found.kinds, [LEAK_KINDS.index(kind) for kind in _LEAKS])
    if leaks != "auto":
        return is_leak & (leaks == "drop")
    given = placed.fixed[found.held_out] != NO_SPLIT
    same_task = placed.tasks[found.train] == placed.tasks[found.held_out]
    return is_leak & ~(given & same_task)


def _remarks(
    sources: Sequence[TaskSource],
    ledger: Ledger,
    audits: Mapping[LeakKind, LeakAudit],
    *,
    leaks: Literal["auto", "drop", "keep"],
    num_train: int,
) -> Iterator[str]:
    """Yield what a user should know about the data, in sentences."""
    yield from ledger.remarks
    found = [audits[kind] for kind in _LEAKS]
    num_removed = sum(audit.num_removed for audit in found)
    num_kept = sum(audit.num_train_records for audit in found) - num_removed
    example = next((example for audit in found for example in audit.examples), None)
    counts = {"num_removed": num_removed, "num_kept": num_kept if leaks == "auto" else 0}
    yield from remarks.overlaps(**counts, num_train=num_train, example=example)
    yield from remarks.unread(ledger.unread)
    numbered = {source.name: column for source in sources if (column := _bare_labels(source))}
    yield from remarks.labels(ledger.labels, numbered=numbered)


def _bare_labels(source: TaskSource) -> str | None:
    """Return the column of the completions if it is called as one of labels is and the recipe does not name them."""
    column = (source.columns or {}).get("completion")
    return column if isinstance(column, str) and is_label(column) and source.labels is None else None


def _leak_audits(
    found: Leaks, placed: Placed, *, splits: SplitNumbers, removed: NDArray[np.bool_]
) -> dict[LeakKind, LeakAudit]:
    """Return the audit of each kind of overlap; listed are as many leaks as may be, by the origins of their records."""

    def record(i: int) -> Record:
        # A copy of a test record in train has its id, so that an id names a record only together with its split.
        first = np.flatnonzero((placed.ids == placed.ids[i]) & (splits == splits[i]))[:1]
        return chosen(placed.records, first)[0]

    counts: dict[LeakKind, int] = {}
    num_removed: dict[LeakKind, int] = {}
    examples: list[tuple[LeakKind, LeakExample]] = []
    for number, kind in enumerate(LEAK_KINDS):
        of_kind = np.flatnonzero(found.kinds == number)
        counts[kind], num_removed[kind] = len(of_kind), int(removed[of_kind].sum())
        for k in of_kind[:MAX_EXAMPLES]:
            train, held_out = record(int(found.train[k])), record(int(found.held_out[k]))
            split, share = SPLIT_NAMES[splits[found.held_out[k]]], float(found.overlap_fractions[k])
            shared = shared_words(train, held_out)
            examples.append((kind, LeakExample(train.origin, held_out.origin, split, share, shared)))
    return leak_audits(counts, examples, removed=num_removed)
