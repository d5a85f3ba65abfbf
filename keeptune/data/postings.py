"""Lay out on the disk which texts have which n-gram, for those n-grams that texts of two groups share.

Memory holds a few million numbers while the files are written, and the n-grams of one batch while they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keeptune.data.disk import DiskArray
from keeptune.data.groups import Members
from keeptune.data.ngrams import HALF, Hashes, Indices, contained, distinct, ngram_hashes, run_starts
from keeptune.data.word_texts import SharedGrams, Texts, grams_of, row_batches

# N-grams that more groups than this have are common wording, whatever text they stand in: their texts are not kept.
MOST_GROUPS = 64
_WORDS_PER_SHARE = 1 << 20
_GRAMS_PER_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Postings:
    """Which texts have an n-gram: of `grams[g]`, ascending, `texts[starts[g]:starts[g + 1]]`, of so many groups.

    N-grams of equal `classes` are in the same texts.
    """

    grams: Hashes
    num_groups: Members
    classes: Hashes
    starts: Indices
    texts: Members

    def of(self, hashes: Hashes) -> tuple[Indices, Indices]:
        """Return which of the hashes are here, and where."""
        if not len(self.grams):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        places = np.minimum(np.searchsorted(self.grams, hashes), len(self.grams) - 1)
        found = np.flatnonzero(self.grams[places] == hashes)
        return found, places[found]


class PostingsFile:
    """The n-grams of some texts that texts of two of their groups share, ascending, without those of `stock`."""

    def __init__(self, texts: Texts, rows: Indices, *, groups: Members, n: int, stock: Hashes, scratch: Path) -> None:
        self._seen = SharedGrams(texts, rows, groups=groups, n=n)
        self._grams = DiskArray(scratch / "postings-grams.u64", np.uint64)
        self._num_groups = DiskArray(scratch / "postings-groups.i32", np.int32)
        self._classes = DiskArray(scratch / "postings-classes.u64", np.uint64)
        self._counts = DiskArray(scratch / "postings-counts.i32", np.int32)
        self._texts = DiskArray(scratch / "postings-texts.i32", np.int32)
        for hashes, owners in self._shares(texts, rows, n=n, stock=stock, scratch=scratch):
            self._add(hashes, owners, groups=groups)

    def _shares(
        self, texts: Texts, rows: Indices, *, n: int, stock: Hashes, scratch: Path
    ) -> Iterator[tuple[Hashes, Members]]:
        """Yield the n-grams, each with its text, by ascending ranges of their hashes."""
        num_shares = 1 + int(texts.lengths[rows].sum()) // _WORDS_PER_SHARE
        hashes = [DiskArray(scratch / f"share-{k}.u64", np.uint64) for k in range(num_shares)]
        owners = [DiskArray(scratch / f"share-{k}.i32", np.int32) for k in range(num_shares)]
        for part in row_batches(texts, rows):
            grams = grams_of(texts, part, n=n)
            kept = np.flatnonzero(self._seen.may_hold(grams.hashes))
            kept = kept[~contained(grams.hashes[kept], stock)]
            found, members = grams.hashes[kept], part[grams.owners[kept]].astype(np.int32)
            shares = (found >> HALF) * np.uint64(num_shares) >> HALF
            for k in range(num_shares):
                hashes[k].append(found[shares == k])
                owners[k].append(members[shares == k])
        for of_share, its_owners in zip(hashes, owners, strict=True):
            yield of_share.whole(), its_owners.whole()
            of_share.remove()
            its_owners.remove()

    def _add(self, hashes: Hashes, owners: Members, *, groups: Members) -> None:
        # A text's n-grams stand together, so that sorting leaves its copies of one side by side.
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        once = np.ones(len(hashes), np.bool_)
        once[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        hashes, owners = hashes[once], owners[once]
        starts = run_starts(hashes)
        if not len(starts):
            return
        counts = np.diff(starts, append=len(hashes))
        codes = np.repeat(np.arange(len(starts)), counts) * len(groups) + groups[owners]
        num_groups = np.bincount(distinct(codes) // len(groups), minlength=len(starts))
        # Two n-grams with the same sum of random numbers, one a text, are in the same texts.
        classes = np.add.reduceat(ngram_hashes(owners.astype(np.uint32), 1), starts)
        shared = num_groups > 1
        has_texts = shared & (num_groups <= MOST_GROUPS)
        self._grams.append(hashes[starts[shared]])
        self._num_groups.append(num_groups[shared].astype(np.int32))
        self._classes.append(classes[shared])
        self._counts.append(np.where(has_texts, counts, 0)[shared].astype(np.int32))
        self._texts.append(owners[np.repeat(has_texts, counts)])

    def of(self, hashes: Hashes) -> Postings:
        """Read those of some n-grams."""
        wanted = distinct(hashes[self._seen.may_hold(hashes)])
        parts: list[tuple[Hashes, Members, Hashes, Members, Members]] = []
        num_before = 0
        for start in range(0, len(self._grams), _GRAMS_PER_BLOCK):
            at = np.array([start]), np.array([min(_GRAMS_PER_BLOCK, len(self._grams) - start)])
            grams, counts = self._grams.ranges(*at), self._counts.ranges(*at)
            ends = num_before + np.cumsum(counts, dtype=np.int64)
            num_before = int(ends[-1])
            asked = wanted[np.searchsorted(wanted, grams[0]) : np.searchsorted(wanted, grams[-1], side="right")]
            places = np.flatnonzero(contained(grams, asked))
            texts = self._texts.ranges(ends[places] - counts[places], counts[places].astype(np.int64))
            numbers, classes = self._num_groups.ranges(*at)[places], self._classes.ranges(*at)[places]
            parts.append((grams[places], numbers, classes, counts[places], texts))
        if not parts:
            parts = [(wanted[:0], np.zeros(0, np.int32), wanted[:0], np.zeros(0, np.int32), np.zeros(0, np.int32))]
        grams, numbers, classes, counts, texts = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Postings(grams, numbers, classes, np.append(0, np.cumsum(counts, dtype=np.int64)), texts)
