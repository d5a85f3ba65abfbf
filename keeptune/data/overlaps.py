"""Find pairs of records of which one has most of what the other says, whatever stands around it.

A text is cut into runs of five words. Two texts that have a run in common are compared by how much of the one the runs
of the other cover. The words of all texts, hashed, lie on the disk; memory holds a few numbers a record and the runs of
one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keeptune.data.clean import STOCK_FLOOR
from keeptune.data.disk import DiskArray
from keeptune.data.groups import Members
from keeptune.data.ngrams import (
    Hashes,
    Indices,
    batches,
    contained,
    distinct,
    frequent,
    joined_ranges,
    run_starts,
)
from keeptune.data.postings import MOST_GROUPS, Postings, PostingsFile
from keeptune.data.record import Record
from keeptune.data.word_texts import (
    LEAST_WORDS,
    WORDS_PER_BATCH,
    Grams,
    Texts,
    grams_of,
    hashed,
    row_batches,
)

COVER_WORDS, COVER_SHARE = 5, 0.5
# A run of five alone, such as "create a list of three", is no input.
_LEAST_COVERED = 6
_STOCK_FRACTION = 0.1
# Words that more groups than this have count less.
_RARE_GROUPS = 3
_WEIGHT_STEPS = 1 << 16
_WORDS_PER_CHUNK = 1 << 18
_OVERLAPS_PER_BATCH = 1 << 17


@dataclass(frozen=True, slots=True)
class Pairs:
    """Records `items` of which the records `covering` have a share, by how much its words count."""

    items: Members
    covering: Members
    shares: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs `[starts, ends)` of an item's words whose n-grams, `grams` the first, are all in the same texts."""

    owners: Indices
    starts: Indices
    ends: Indices
    grams: Indices


class PairFile:
    """Pairs on the disk, in the order in which they were found."""

    def __init__(self, pairs: Iterable[Pairs], *, scratch: Path) -> None:
        self._items = DiskArray(scratch / "pairs-items.i32", np.int32)
        self._covering = DiskArray(scratch / "pairs-covering.i32", np.int32)
        self._shares = DiskArray(scratch / "pairs-shares.f64", np.float64)
        for part in pairs:
            self._items.append(part.items)
            self._covering.append(part.covering)
            self._shares.append(part.shares)

    def __iter__(self) -> Iterator[Pairs]:
        for start in range(0, len(self._items), WORDS_PER_BATCH):
            at = np.array([start]), np.array([min(WORDS_PER_BATCH, len(self._items) - start)])
            yield Pairs(self._items.ranges(*at), self._covering.ranges(*at), self._shares.ranges(*at))


class OverlapSearch:
    """The texts of records, ready to be searched for what they have in common beside the wording of templates.

    `groups` are those of near-duplicates: records of one group are not compared. Files lie in `scratch`.
    """

    def __init__(self, records: Sequence[Record], *, groups: Members, scratch: Path) -> None:
        self._texts, self._tasks = hashed(records, scratch=scratch)
        self._groups = np.concatenate([groups, groups])
        self._num_records = len(records)
        self._scratch = scratch

    def covers(
        self,
        *,
        items: NDArray[np.bool_],
        covering: NDArray[np.bool_],
        n: int = COVER_WORDS,
        above: float = COVER_SHARE,
    ) -> Iterator[Pairs]:
        """Yield which of the records `covering` cover more than `above` of which of `items`, in runs of `n` words."""
        texts, num = self._texts, self._num_records
        item_rows, all_rows = (np.flatnonzero(np.concatenate([mask, mask])) for mask in (items, items | covering))
        item_rows, all_rows = (rows[texts.lengths[rows] > 0] for rows in (item_rows, all_rows))
        stock = distinct(np.concatenate([np.zeros(0, np.uint64), *(_stock(texts, rows, n=n) for rows in self._tasks)]))
        file = PostingsFile(texts, all_rows, groups=self._groups, n=n, stock=stock, scratch=self._scratch)
        may_cover = np.concatenate([covering, covering])
        for chunk in batches(texts.lengths[item_rows], at_most=_WORDS_PER_CHUNK):
            rows = item_rows[chunk]
            parts = [grams_of(texts, part, n=n).hashes for part in row_batches(texts, rows)]
            postings = file.of(np.concatenate(parts))
            for part in row_batches(texts, rows):
                grams = grams_of(texts, part, n=n)
                known, places = postings.of(grams.hashes)
                num_groups = np.ones(len(grams.hashes), np.int32)
                num_groups[known] = postings.num_groups[places]
                before, totals = self._weights(part, grams, num_groups, n=n, stock=stock)
                runs = _runs(postings, grams, known=known, places=places, n=n)
                groups = self._groups[part]
                for owners, found, shares in self._covers(postings, runs, groups=groups, before=before, totals=totals):
                    kept = (shares > above) & may_cover[found]
                    yield Pairs(
                        (part[owners[kept]] % num).astype(np.int32), (found[kept] % num).astype(np.int32), shares[kept]
                    )

    def _weights(
        self, part: Indices, grams: Grams, num_groups: Members, *, n: int, stock: Hashes
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the weight before each word, and that of each text, 0 where it is not to be looked at."""
        lengths = self._texts.lengths[part]
        # A sum of multiples of one fraction is exact in any order.
        of_gram = np.ceil((_RARE_GROUPS / np.maximum(num_groups, _RARE_GROUPS)) ** 2 * _WEIGHT_STEPS) / _WEIGHT_STEPS
        of_gram[contained(grams.hashes, stock)] = 0.0
        weights = np.ones(int(lengths.sum()))
        # No two n-grams begin at one place.
        for k in range(n):
            weights[grams.places + k] = np.minimum(weights[grams.places + k], of_gram)
        # The difference of two entries is the weight between two places.
        before = np.concatenate([[0.0], np.cumsum(weights)])
        ends = np.cumsum(lengths)
        num_counted = np.concatenate([[0], np.cumsum(weights > 0)])
        enough = num_counted[ends] - num_counted[ends - lengths] >= LEAST_WORDS
        return before, np.where(enough, before[ends] - before[ends - lengths], 0.0)

    def _covers(
        self,
        postings: Postings,
        runs: _Runs,
        *,
        groups: Members,
        before: NDArray[np.float64],
        totals: NDArray[np.float64],
    ) -> Iterator[tuple[Indices, Indices, NDArray[np.float64]]]:
        """Yield items by their number in the batch, texts that cover them, and the shares of their weight."""
        sizes = np.diff(postings.starts)[runs.grams]
        # The runs of one item stay in one batch.
        firsts = run_starts(runs.owners)
        num_overlaps = np.add.reduceat(sizes, firsts) if len(firsts) else sizes
        edges = np.append(firsts, len(runs.owners))
        num_texts = len(self._texts.lengths)
        for part in batches(num_overlaps, at_most=_OVERLAPS_PER_BATCH):
            rows = slice(edges[part.start], edges[part.stop])
            counts = sizes[rows]
            covering = postings.texts[joined_ranges(postings.starts[runs.grams[rows]], counts)]
            owners = np.repeat(runs.owners[rows], counts)
            starts, ends = np.repeat(runs.starts[rows], counts), np.repeat(runs.ends[rows], counts)
            kept = (self._groups[covering] != groups[owners]) & (totals[owners] > 0)
            keys = owners[kept] * num_texts + covering[kept]
            order = np.argsort(keys, kind="stable")
            keys, starts, ends = keys[order], starts[kept][order], ends[kept][order]
            if not len(keys):
                continue
            pairs = run_starts(keys)
            # Runs ascend and overlap by up to n - 1 words: what the one before covered counts once.
            begins = np.maximum(starts, np.append(0, ends[:-1]))
            begins[pairs] = starts[pairs]
            covered = np.add.reduceat(before[ends] - before[begins], pairs)
            enough = np.add.reduceat(ends - begins, pairs) >= _LEAST_COVERED
            pairs, covered = pairs[enough], covered[enough]
            found = keys[pairs] // num_texts
            yield found, keys[pairs] % num_texts, np.minimum(covered / totals[found], 1.0)


def _stock(texts: Texts, rows: Indices, *, n: int) -> Hashes:
    """Return, ascending, the n-grams in more than a tenth of one task's texts and in more than 10.

    What stands in more than a tenth of all stands in more than a tenth of some batch, so only that is counted.
    """
    parts = row_batches(texts, rows)
    often = [frequent(grams_of(texts, part, n=n).hashes, above=_STOCK_FRACTION * len(part)) for part in parts]
    candidates = distinct(np.concatenate([np.zeros(0, np.uint64), *often]))
    counts = np.zeros(len(candidates), np.int64)
    for part in parts if len(candidates) else ():
        grams = grams_of(texts, part, n=n)
        codes = _codes(grams.hashes, grams.owners, among=candidates, num_owners=len(part))
        counts += np.bincount(codes // len(part), minlength=len(candidates))
    return candidates[counts > max(STOCK_FLOOR, _STOCK_FRACTION * len(rows))]


def _codes(hashes: Hashes, owners: NDArray[np.integer], *, among: Hashes, num_owners: int) -> Indices:
    """Return, ascending and once each, (index in `among`) * num_owners + owner of the hashes that stand there."""
    inside = contained(hashes, among)
    return distinct(np.searchsorted(among, hashes[inside]) * num_owners + owners[inside])


def _runs(postings: Postings, grams: Grams, *, known: Indices, places: Indices, n: int) -> _Runs:
    """Return the runs of the n-grams `known`, which stand at `places` of the postings."""
    few = postings.num_groups[places] <= MOST_GROUPS
    shared, indices = known[few], places[few]
    owners, places = grams.owners[shared], grams.places[shared]
    classes = postings.classes[indices]
    broken = np.ones(len(owners), np.bool_)
    broken[1:] = (owners[1:] != owners[:-1]) | (places[1:] != places[:-1] + 1) | (classes[1:] != classes[:-1])
    first = np.flatnonzero(broken)
    last = np.append(first[1:], len(owners))[: len(first)] - 1
    return _Runs(owners[first], places[first], places[last] + n, indices[first])
