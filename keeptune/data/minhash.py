"""Sets of n-grams on the disk arrive; verified links between near-duplicates leave, whatever order the sets came in.

Near-duplicates are sought by MinHash: 20 bands of 5 rows propose a pair of Jaccard similarity 0.8 with probability
0.9996. A proposed pair whose signatures agree in fewer than 64 of the 100 rows is let go (at 0.8 about 1 in 10,000 is),
every other one is verified on its n-grams. Both steps look at the two sets alone. Memory holds a few numbers a set:
signatures, the keys of each band and the n-grams themselves lie on the disk. Source: Broder 1997, "On the resemblance
and containment of documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keeptune.data.disk import DiskArray
from keeptune.data.groups import Members, roots, union
from keeptune.data.ngrams import (
    HALF,
    MULTIPLIER,
    Hashes,
    Indices,
    batches,
    contained,
    distinct,
    run_starts,
    word_hash,
)

GRAMS_PER_BATCH = 1 << 18
_NUM_BANDS, _ROWS_PER_BAND = 20, 5
_NUM_HASHES = _NUM_BANDS * _ROWS_PER_BAND
_LEAST_AGREEING = 64
_PAIRS_PER_BATCH = 1 << 12
# Members this far apart in their bucket are not compared before the bucket is refined.
_FAR = 16
_ROUNDING = 1e-9
# A pair's number stands in the upper bits of a key, its gram's hash in the lower ones.
_GRAM_BITS = 46


@dataclass(frozen=True, slots=True)
class GramSets:
    """Sets of distinct n-grams, none empty, in an order of content.

    Those of set k, ascending, are `lengths[k]` numbers of `grams` from `starts[k]` on; `texts[k]` is the first text
    that has them.
    """

    grams: DiskArray[np.uint64]
    starts: Indices
    lengths: Members
    texts: Members

    def of(self, members: NDArray[np.integer]) -> Hashes:
        """Read the n-grams of some sets, set after set."""
        return self.grams.ranges(self.starts[members], self.lengths[members].astype(np.int64))


@dataclass(frozen=True, slots=True)
class Links:
    """Pairs of sets that are near-duplicates, in the order in which they were found."""

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    similarities: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sets that share a band: `members` bucket after bucket, and beside each the number of its bucket."""

    members: Members
    numbers: Members


def verified_links(sets: GramSets, *, threshold: float, scratch: Path) -> Links:
    """Return enough verified pairs to connect all sets that a chain of proposed and verified pairs connects."""
    bands = _Bands(sets, scratch=scratch)
    search = _Search(sets, bands.signatures, threshold=threshold)
    # The buckets of all bands together are many times the sets; most are settled by their neighbours.
    pairs = np.zeros(0, np.int64)
    for band in range(_NUM_BANDS):
        pairs = distinct(np.concatenate([pairs, search.open_pairs(bands.buckets(band), distance=1)]))
    search.compare(pairs)
    left = _joined([search.unsettled(bands.buckets(band), distance=2) for band in range(_NUM_BANDS)])
    left = search.settle(left, distances=range(2, _FAR + 1))
    starts = run_starts(left.numbers)
    for start, end in zip(starts, np.append(starts[1:], len(left.members)), strict=False):
        bucket = refined(sets, left.members[start:end], threshold=threshold)
        search.settle(bucket, distances=range(1, len(bucket.members) + 1))
    return search.links()


class _Search:
    """The links found so far, and which sets they connect."""

    def __init__(self, sets: GramSets, signatures: DiskArray[np.uint32], *, threshold: float) -> None:
        num_sets = len(sets.lengths)
        self._sets = sets
        self._signatures = signatures
        self._threshold = threshold
        self._pairs, self._similarities = array("i"), array("d")
        self._parents = array("i", range(num_sets))
        self._labels = np.arange(num_sets, dtype=np.int32)
        self._refuted = np.zeros(0, np.int64)

    def links(self) -> Links:
        """Return the links found."""
        pairs = np.array(self._pairs, np.int32).reshape(-1, 2)
        return Links(pairs[:, 0], pairs[:, 1], np.array(self._similarities, np.float64))

    def settle(self, buckets: Buckets, *, distances: range) -> Buckets:
        """Compare members at growing distances within their bucket; return the buckets that are not settled then.

        Pairs that are connected already are skipped, which changes no group. A bucket is settled once its members are
        connected or each pair was compared.
        """
        for distance in distances:
            buckets = self.unsettled(buckets, distance=distance)
            if not len(buckets.members):
                break
            self.compare(self.open_pairs(buckets, distance=distance))
        return self.unsettled(buckets, distance=distances.stop)

    def open_pairs(self, buckets: Buckets, *, distance: int) -> Indices:
        """Return, ascending, the pairs `distance` apart in a bucket that are not connected.

        A pair is coded as smaller index * number of sets + larger index.
        """
        members, numbers = buckets.members, buckets.numbers
        left, right = members[:-distance], members[distance:]
        is_open = (numbers[:-distance] == numbers[distance:]) & (self._labels[left] != self._labels[right])
        left, right = left[is_open].astype(np.int64), right[is_open].astype(np.int64)
        return distinct(np.minimum(left, right) * len(self._labels) + np.maximum(left, right))

    def compare(self, pairs: Indices) -> None:
        """Verify pairs, ascending and coded as by `open_pairs`, and link those that are near."""
        num_sets = len(self._labels)
        pairs = pairs[~contained(pairs, self._refuted)]
        pairs = pairs[self._alike(pairs // num_sets, pairs % num_sets)]
        left, right = pairs // num_sets, pairs % num_sets
        similarities = _jaccard(self._sets, left, right)
        near = similarities >= self._threshold
        if not near.all():
            self._refuted = np.sort(np.concatenate([self._refuted, pairs[~near]]))
        for i, j, similarity in zip(left[near], right[near], similarities[near], strict=True):
            if union(self._parents, int(i), int(j)):
                self._pairs.extend((int(i), int(j)))
                self._similarities.append(float(similarity))
        if near.any():
            self._labels = roots(np.frombuffer(self._parents, np.int32))

    def unsettled(self, buckets: Buckets, *, distance: int) -> Buckets:
        """Return the buckets that have pairs `distance` apart and members which are not yet connected."""
        if not len(buckets.members):
            return buckets
        starts = run_starts(buckets.numbers)
        sizes = np.diff(starts, append=len(buckets.members))
        labels = self._labels[buckets.members]
        mixed = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
        kept = np.repeat(mixed & (sizes > distance), sizes)
        return Buckets(buckets.members[kept], buckets.numbers[kept])

    def _alike(self, left: Indices, right: Indices) -> NDArray[np.bool_]:
        """Tell for each pair of sets whether enough rows of their signatures agree to be worth verifying."""
        alike = np.zeros(len(left), np.bool_)
        for start in range(0, len(left), _PAIRS_PER_BATCH):
            part = slice(start, start + _PAIRS_PER_BATCH)
            rows = [self._signature_rows(side[part]) for side in (left, right)]
            alike[part] = np.count_nonzero(rows[0] == rows[1], axis=1) >= _LEAST_AGREEING
        return alike

    def _signature_rows(self, members: Indices) -> NDArray[np.uint32]:
        # Signatures lie in the order of the n-grams in their file.
        found = self._signatures.ranges(_NUM_HASHES * members, np.full(len(members), _NUM_HASHES))
        return found.reshape(-1, _NUM_HASHES)


class _Bands:
    """The signatures of all sets, 100 minima a set, each over another multiplication of the grams' upper halves."""

    def __init__(self, sets: GramSets, *, scratch: Path) -> None:
        factors = [np.uint32(word_hash(f"minhash {k}") | 1) for k in range(_NUM_HASHES)]
        self._num_sets = len(sets.lengths)
        self.signatures = DiskArray(scratch / "signatures.u32", np.uint32)
        self._keys = [DiskArray(scratch / f"band-{band}.u64", np.uint64) for band in range(_NUM_BANDS)]
        for part in batches(sets.lengths.astype(np.int64), at_most=GRAMS_PER_BATCH):
            lengths = sets.lengths[part].astype(np.int64)
            halves = (sets.grams.ranges(sets.starts[part], lengths) >> HALF).astype(np.uint32)
            starts = np.cumsum(lengths) - lengths
            rows = np.empty((len(lengths), _NUM_HASHES), np.uint32)
            for k, factor in enumerate(factors):
                rows[:, k] = np.minimum.reduceat(halves * factor, starts)
            self.signatures.append(rows)
            for band, keys in enumerate(self._keys):
                keys.append(_band_keys(rows[:, band * _ROWS_PER_BAND : (band + 1) * _ROWS_PER_BAND]))

    def buckets(self, band: int) -> Buckets:
        """Return the sets that share their key of this band with another; no two bands number buckets alike."""
        keys = self._keys[band].whole()
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys = keys[order]
        starts = run_starts(keys)
        sizes = np.diff(starts, append=len(keys))
        shared = np.repeat(sizes > 1, sizes)
        members = order[shared]
        numbers = np.repeat(np.cumsum(sizes > 1, dtype=np.int32), sizes)[shared]
        # Of n sets at most n / 2 buckets hold two.
        return Buckets(members, numbers + np.int32(band * (self._num_sets // 2 + 1)))


def _band_keys(rows: NDArray[np.uint32]) -> Hashes:
    keys = np.zeros(len(rows), np.uint64)
    for k in range(_ROWS_PER_BAND):
        keys *= MULTIPLIER
        keys += rows[:, k]
        keys ^= keys >> HALF
    return keys


def _joined(parts: list[Buckets]) -> Buckets:
    return Buckets(np.concatenate([part.members for part in parts]), np.concatenate([part.numbers for part in parts]))


def refined(sets: GramSets, members: Members, *, threshold: float) -> Buckets:
    """Return small buckets which together hold every pair of a large bucket that can reach the threshold.

    A pair reaches it only with s * (|x| + |y|) n-grams in common, s = threshold / (1 + threshold). A pair whose
    n-grams of many members (the wording of a template) may suffice for that has both its texts in one bucket of such
    texts. Every other pair needs an n-gram of few members besides, and there is one bucket for each of those.
    """
    lengths = sets.lengths[members].astype(np.int64)
    num_common = np.zeros(len(members), np.int64)
    found, num_buckets = [Buckets(np.zeros(0, np.int32), np.zeros(0, np.int32))], 0
    # A share of the hashes at a time: what many members have in common is counted for each n-gram by itself.
    num_parts = 1 + int(lengths.sum()) // (4 * GRAMS_PER_BATCH)
    for number in range(num_parts):
        grams, owners = _part_of_grams(sets, members, number=number, num_parts=num_parts)
        order = np.argsort(grams, kind="stable")
        owners = owners[order]
        starts = run_starts(grams[order])
        sizes = np.diff(starts, append=len(grams))
        is_common = np.repeat(sizes > _FAR, sizes)
        num_common += np.bincount(owners[is_common], minlength=len(members))
        few = np.repeat((sizes > 1) & (sizes <= _FAR), sizes)
        numbers = np.repeat(np.arange(num_buckets, num_buckets + len(starts), dtype=np.int32), sizes)[few]
        found.append(Buckets(members[owners[few]], numbers))
        num_buckets += len(starts)
    # |x| and |y| stand alone on each side: common(x) - s |x| >= s |y|, and the same the other way round.
    share = threshold / (1 + threshold)
    surplus = num_common - share * lengths
    is_rich = (surplus >= share * lengths.min() - _ROUNDING) & (share * lengths <= surplus.max() + _ROUNDING)
    rich = members[is_rich]
    return _joined([*found, Buckets(rich, np.full(len(rich), num_buckets, np.int32))])


def _part_of_grams(sets: GramSets, members: Members, *, number: int, num_parts: int) -> tuple[Hashes, Members]:
    """Return the n-grams of some sets in one share of all hashes, and whose they are, by place in `members`."""
    lengths = sets.lengths[members].astype(np.int64)
    parts: list[tuple[Hashes, Members]] = []
    for rows in batches(lengths, at_most=GRAMS_PER_BATCH):
        grams = sets.of(members[rows])
        owners = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), lengths[rows])
        if num_parts > 1:
            inside = (grams >> HALF) * np.uint64(num_parts) >> HALF == np.uint64(number)
            grams, owners = grams[inside], owners[inside]
        parts.append((grams, owners))
    return np.concatenate([grams for grams, _ in parts]), np.concatenate([owners for _, owners in parts])


def _jaccard(sets: GramSets, left: Indices, right: Indices) -> NDArray[np.float64]:
    """Return the Jaccard similarity of each pair of sets."""
    lengths, common = sets.lengths, np.zeros(len(left), np.int64)
    sums = lengths[left].astype(np.int64) + lengths[right]
    for rows in batches(sums, at_most=GRAMS_PER_BATCH):
        keys = np.sort(np.concatenate([_pair_keys(sets, left[rows]), _pair_keys(sets, right[rows])]))
        numbers = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(_GRAM_BITS)
        common[rows] = np.bincount(numbers.astype(np.int64), minlength=rows.stop - rows.start)
    return common / (sums - common)


def _pair_keys(sets: GramSets, side: Indices) -> Hashes:
    """Return the grams of the sets on one side of the pairs, each with the pair's number above its 46 lower bits."""
    numbers = np.repeat(np.arange(len(side), dtype=np.uint64), sets.lengths[side])
    return (numbers << np.uint64(_GRAM_BITS)) | (sets.of(side) >> np.uint64(64 - _GRAM_BITS))
