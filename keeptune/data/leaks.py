"""Records and their splits arrive; train records that overlap with what was held out leave, by kind of overlap."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from keeptune.data.clean import jaccard
from keeptune.data.disk import chosen
from keeptune.data.groups import Members
from keeptune.data.heap import gives_back_freed
from keeptune.data.ngrams import Hashes, run_starts
from keeptune.data.overlaps import OverlapSearch, Pairs
from keeptune.data.record import Record
from keeptune.data.split import TRAIN, SplitNumbers

LeakKind = Literal["exact", "near", "ngram_cover", "ngram_13"]
LEAK_KINDS: tuple[LeakKind, ...] = get_args(LeakKind)

_LONG_WORDS = 13
_MAX_WITNESSES = 16


@dataclass(frozen=True, slots=True)
class Leaks:
    """Train records that overlap with a held-out one, ascending by number, each under the first kind that holds.

    `kinds` are places in `LEAK_KINDS`. exact: the same normalised prompt. near: in one group of near-duplicates; the
    overlap is the Jaccard similarity of the two prompts. ngram_cover: the train record covers that fraction, more than
    half, of the held-out record's prompt or completion (see `overlaps`). ngram_13: it covers that fraction in runs of
    13 words, where any fraction counts; such a record is no leak to remove.
    """

    train: Members
    held_out: Members
    kinds: NDArray[np.int8]
    overlap_fractions: NDArray[np.float64]


class _Found:
    """One kind of leak, or -1, for every record, with its held-out record and the overlap."""

    def __init__(self, num_records: int) -> None:
        self.kinds = np.full(num_records, -1, np.int8)
        self.held_out = np.zeros(num_records, np.int32)
        self.overlap_fractions = np.zeros(num_records)

    def add_covers(self, pairs: Iterable[Pairs], *, kind: LeakKind, held_out: NDArray[np.bool_]) -> None:
        """Take in which train records cover which held-out ones; of several stays the one that is covered most."""
        number = LEAK_KINDS.index(kind)
        is_open = ~held_out & (self.kinds < 0)
        for part in pairs:
            crosses = np.flatnonzero(held_out[part.items] & is_open[part.covering])
            items, covering, shares = part.items[crosses], part.covering[crosses], part.shares[crosses]
            order = np.lexsort((items, -shares, covering))
            best = order[run_starts(covering[order])]
            best = best[shares[best] > self.overlap_fractions[covering[best]]]
            self.kinds[covering[best]] = number
            self.held_out[covering[best]], self.overlap_fractions[covering[best]] = items[best], shares[best]

    def leaks(self) -> Leaks:
        """Return what was found."""
        train = np.flatnonzero(self.kinds >= 0).astype(np.int32)
        return Leaks(train, self.held_out[train], self.kinds[train], self.overlap_fractions[train])


@gives_back_freed
def find_leaks(
    records: Sequence[Record],
    *,
    keys: Hashes,
    groups: Members,
    splits: SplitNumbers,
    search: OverlapSearch | None = None,
    covers: Iterable[Pairs] | None = None,
    scratch: Path | None = None,
) -> Leaks:
    """Return at most one leak for each train record.

    `keys` are those of the prompts, `groups` the near-duplicates of each record. `search` holds the records' texts, and
    `covers` which record covers which, if they are there already; else files lie in `scratch` for as long as the search
    takes, by default where the system has them.
    """
    found = _Found(len(records))
    held_out = splits != TRAIN
    if held_out.all() or not held_out.any():
        return found.leaks()
    _find_group_leaks(records, found, keys=keys, groups=groups, splits=splits)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="leaks-") as folder:
        search = search or OverlapSearch(records, groups=groups, scratch=Path(folder))
        covers = search.covers(items=held_out, covering=~held_out) if covers is None else covers
        found.add_covers(covers, kind="ngram_cover", held_out=held_out)
        left = ~held_out & (found.kinds < 0)
        runs = search.covers(n=_LONG_WORDS, above=0.0, items=held_out, covering=left)
        found.add_covers(runs, kind="ngram_13", held_out=held_out)
    return found.leaks()


def _find_group_leaks(
    records: Sequence[Record], found: _Found, *, keys: Hashes, groups: Members, splits: SplitNumbers
) -> None:
    """Find a leak of kind exact or near for each train record in one group with a held-out record."""
    held_out = np.flatnonzero(splits != TRAIN)
    held_out = held_out[np.argsort(groups[held_out], kind="stable")]
    train = np.flatnonzero(splits == TRAIN)
    starts = np.searchsorted(groups[held_out], groups[train], side="left")
    ends = np.searchsorted(groups[held_out], groups[train], side="right")
    mixed = ends > starts
    for i, start, end in zip(train[mixed], starts[mixed], ends[mixed], strict=True):
        others = held_out[start:end]
        same = others[(keys[others] == keys[i]).all(axis=1)]
        if len(same):
            kind, share, j = "exact", 1.0, same[0]
        else:
            others = others[:_MAX_WITNESSES]
            prompt, *prompts = (record.prompt for record in chosen(records, np.append(i, others)))
            share, j = max((jaccard(prompt, other), j) for other, j in zip(prompts, others, strict=True))
            kind = "near"
        found.kinds[i] = LEAK_KINDS.index(kind)
        found.held_out[i], found.overlap_fractions[i] = j, share
