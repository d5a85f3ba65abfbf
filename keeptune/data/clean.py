"""Texts arrive; keys of exact copies and verified near-duplicates leave, each a function of content, not of order.

Near-duplicates are sought by MinHash: 20 bands of 5 rows propose a pair of Jaccard similarity 0.8 with probability
0.9996. A proposed pair whose signatures agree in fewer than 64 of the 100 rows is let go (at 0.8 about 1 in 10,000 is),
every other one is verified on its n-grams. Both steps look at the two texts alone, so that no third text can break a
link, with one exception: what counts as the wording of a task's template depends on how many of its texts have it, so
rows that carry it past half of them, or back, change links. Source: Broder 1997, "On the resemblance and containment of
documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keeptune.data.ngrams import (
    HALF,
    MULTIPLIER,
    Hashes,
    Indices,
    batches,
    contained,
    distinct,
    frequent,
    joined_ranges,
    ngram_hashes,
    normalised,
    run_starts,
    word_hash,
    words,
)
from keeptune.data.record import Record

_NUM_BANDS, _ROWS_PER_BAND = 20, 5
_NUM_HASHES = _NUM_BANDS * _ROWS_PER_BAND
_LEAST_AGREEING = 64
_SHORT_WORDS = 20
STOCK_FLOOR = 10
_STOCK_FRACTION = 0.5
_GRAMS_PER_BATCH = 1 << 18
_PAIRS_PER_BATCH = 1 << 14
# Members this far apart in their bucket are not compared before the bucket is refined.
_FAR = 16
_ROUNDING = 1e-9
# A pair's number stands in the upper bits of a key, its gram's hash in the lower ones.
_GRAM_BITS = 46


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Links between near-duplicate texts and the groups that they make.

    The pairs are a spanning forest: each is verified, none closes a circle, so of a group of n texts n - 1 pairs are
    listed. `similarities` holds the Jaccard similarity of each pair; `groups` one group number a text.
    """

    pairs: tuple[tuple[int, int], ...]
    similarities: tuple[float, ...]
    groups: list[int]


@dataclass(frozen=True, slots=True)
class _GramSets:
    """Sets of distinct n-grams: those of set k, ascending, are `lengths[k]` of `grams` from `starts[k]` on.

    `texts[k]` is the first text that has set k.
    """

    grams: Hashes
    starts: Indices
    lengths: Indices
    texts: Indices


@dataclass(frozen=True, slots=True)
class _Buckets:
    """Texts that share a band: `members` bucket after bucket, and beside each the number of its bucket."""

    members: Indices
    numbers: Indices


def prompt_key(record: Record) -> str:
    """Return 32 hexadecimal digits that depend on the normalised prompt alone."""
    return _digest(normalised(record.prompt))


def exact_key(record: Record) -> str:
    """Return 32 hexadecimal digits that depend on the normalised prompt and completion alone."""
    return _digest(f"{normalised(record.prompt)}\0{normalised(record.completion)}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def near_duplicates(
    texts: Sequence[str], *, threshold: float = 0.8, tasks: Sequence[str] | None = None
) -> NearDuplicates:
    """Link texts whose n-gram sets have a Jaccard similarity of at least `threshold` (0.8 or more).

    The n-grams are those of 3 words, or of 5 characters where a text has fewer than 20 words. With `tasks` (one a
    text), n-grams in more than half of a task's texts (and in more than 10) are left out: they are the wording of its
    template, beside which two different inputs would look alike and one input under two templates would not.
    """
    sets, twins = _distinct_gram_sets(texts, tasks=tasks)
    found = [(members[0], other, 1.0) for members in twins for other in members[1:]]
    for i, j, similarity in _verified_links(sets, threshold=threshold):
        first, second = sorted((int(sets.texts[i]), int(sets.texts[j])))
        found.append((first, second, similarity))
    parents = list(range(len(texts)))
    kept = sorted(link for link in found if union(parents, link[0], link[1]))
    groups = [find(parents, i) for i in range(len(texts))]
    return NearDuplicates(tuple((i, j) for i, j, _ in kept), tuple(similarity for *_, similarity in kept), groups)


def find(parents: list[int], i: int) -> int:
    """Return the root of `i` in a forest of parents, and shorten the path to it."""
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


def union(parents: list[int], i: int, j: int) -> bool:
    """Join the trees of `i` and `j` under the smaller root, in place; return False where they were one."""
    low, high = sorted((find(parents, i), find(parents, j)))
    parents[high] = low
    return low != high


def _distinct_gram_sets(texts: Sequence[str], *, tasks: Sequence[str] | None) -> tuple[_GramSets, list[list[int]]]:
    """Return a gram set for each distinct text of a task, in an order of content, and the texts of equal grams."""
    hash_of = functools.cache(word_hash)
    by_task: defaultdict[str, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        by_task[tasks[i] if tasks else ""].append(i)
    twins: defaultdict[bytes, list[int]] = defaultdict(list)
    firsts: dict[tuple[bytes, str], int] = {}
    # A bytearray grows in place, so that the grams never stand in memory twice.
    buffer, lengths = bytearray(), []
    for task in sorted(by_task):
        before = len(lengths)
        for i in by_task[task]:
            content = _grams(texts[i], hash_of=hash_of).tobytes()
            fingerprint = hashlib.blake2b(content, digest_size=16).digest()
            twins[fingerprint].append(i)
            if firsts.setdefault((fingerprint, task), i) == i:
                buffer += content
                lengths.append(len(content) // 8)
        if tasks:
            lengths[before:] = _drop_stock(buffer, lengths[before:])
    order = np.array([k for k, _ in sorted(enumerate(firsts), key=lambda entry: entry[1])], np.int64)
    sizes = np.array(lengths, np.int64)
    first_texts = np.array(list(firsts.values()), np.int64)
    sets = _GramSets(
        np.frombuffer(buffer, np.uint64), (np.cumsum(sizes) - sizes)[order], sizes[order], first_texts[order]
    )
    return sets, [sorted(members) for members in twins.values()]


def _drop_stock(buffer: bytearray, lengths: list[int]) -> list[int]:
    """Remove the stock grams from the last sets of the buffer, in place, and return the new lengths of those sets."""
    grams = np.frombuffer(buffer, np.uint64)
    start = len(grams) - sum(lengths)
    stock = frequent(grams[start:], above=max(STOCK_FLOOR, _STOCK_FRACTION * len(lengths)))
    if not len(stock):
        return lengths
    kept_lengths, end = [], start
    for length in lengths:
        part = grams[start : start + length]
        part = part[~contained(part, stock)]
        grams[end : end + len(part)] = part
        kept_lengths.append(len(part))
        start, end = start + length, end + len(part)
    # A bytearray that is viewed cannot shrink.
    del grams
    del buffer[8 * end :]
    return kept_lengths


def _grams(text: str, *, hash_of: functools._lru_cache_wrapper[int]) -> Hashes:
    text = normalised(text)
    found = words(text)
    if len(found) >= _SHORT_WORDS:
        return distinct(ngram_hashes(np.fromiter(map(hash_of, found), np.uint32, len(found)), 3))
    characters = np.frombuffer(text.ljust(5).encode("utf-32-le", "surrogatepass"), np.uint32)
    return distinct(ngram_hashes(characters, 5))


def _verified_links(sets: _GramSets, *, threshold: float) -> list[tuple[int, int, float]]:
    """Return enough verified pairs to connect all sets that a chain of proposed and verified pairs connects."""
    search = _Search(sets, threshold=threshold)
    left = search.settle(_buckets(search.signatures, nonempty=np.flatnonzero(sets.lengths)), max_distance=_FAR)
    starts = run_starts(left.numbers)
    for start, end in zip(starts, np.append(starts[1:], len(left.members)), strict=False):
        refined = _refined(sets, left.members[start:end], threshold=threshold)
        search.settle(refined, max_distance=len(refined.members))
    return search.links


class _Search:
    """The links found so far, and which sets they connect."""

    def __init__(self, sets: _GramSets, *, threshold: float) -> None:
        self.signatures = _signatures(sets)
        self.links: list[tuple[int, int, float]] = []
        self._sets = sets
        self._threshold = threshold
        self._parents = list(range(len(sets.lengths)))
        self._labels = np.arange(len(sets.lengths))
        self._refuted = np.zeros(0, np.int64)

    def settle(self, buckets: _Buckets, *, max_distance: int) -> _Buckets:
        """Compare members at distance 1, 2, ... within their bucket; return the buckets that are not settled then.

        Pairs that are connected already are skipped, which changes no group. A bucket is settled once its members are
        connected or each pair was compared.
        """
        num_sets = len(self._labels)
        for distance in range(1, max_distance + 1):
            buckets = _unsettled(buckets, self._labels, distance=distance)
            members, numbers = buckets.members, buckets.numbers
            if not len(members):
                break
            left, right = members[:-distance], members[distance:]
            open_ = (numbers[:-distance] == numbers[distance:]) & (self._labels[left] != self._labels[right])
            self._compare(distinct(np.minimum(left, right)[open_] * num_sets + np.maximum(left, right)[open_]))
        return _unsettled(buckets, self._labels, distance=max_distance + 1)

    def _compare(self, pairs: Indices) -> None:
        """Verify pairs, each coded as smaller index * number of sets + larger index, and link those that are near."""
        num_sets = len(self._labels)
        pairs = pairs[~contained(pairs, self._refuted)]
        pairs = pairs[_alike(self.signatures, pairs // num_sets, pairs % num_sets)]
        left, right = pairs // num_sets, pairs % num_sets
        similarities = _jaccard(self._sets, left, right)
        near = similarities >= self._threshold
        self._refuted = np.sort(np.concatenate([self._refuted, pairs[~near]]))
        for i, j, similarity in zip(left[near], right[near], similarities[near], strict=True):
            if union(self._parents, int(i), int(j)):
                self.links.append((int(i), int(j), float(similarity)))
        if near.any():
            self._labels = np.array([find(self._parents, i) for i in range(num_sets)])


def _refined(sets: _GramSets, members: Indices, *, threshold: float) -> _Buckets:
    """Return small buckets which together hold every pair of a large bucket that can reach the threshold.

    A pair reaches it only with s * (|x| + |y|) n-grams in common, s = threshold / (1 + threshold). A pair whose
    n-grams of many members (the wording of a template) may suffice for that has both its texts in one bucket of such
    texts. Every other pair needs an n-gram of few members besides, and there is one bucket for each of those.
    """
    lengths = sets.lengths[members]
    grams = sets.grams[joined_ranges(sets.starts[members], lengths)]
    order = np.argsort(grams)
    owners = np.repeat(np.arange(len(members)), lengths)[order]
    starts = run_starts(grams[order])
    sizes = np.diff(starts, append=len(grams))
    is_common = np.repeat(sizes > _FAR, sizes)
    # |x| and |y| stand alone on each side: common(x) - s |x| >= s |y|, and the same the other way round.
    share = threshold / (1 + threshold)
    surplus = np.bincount(owners[is_common], minlength=len(members)) - share * lengths
    is_rich = (surplus >= share * lengths.min() - _ROUNDING) & (share * lengths <= surplus.max() + _ROUNDING)
    few = np.repeat((sizes > 1) & (sizes <= _FAR), sizes)
    rich = members[is_rich]
    numbers = np.repeat(np.arange(len(starts)), sizes)[few]
    return _Buckets(
        np.concatenate([members[owners[few]], rich]), np.concatenate([numbers, np.full(len(rich), len(starts))])
    )


def _signatures(sets: _GramSets) -> NDArray[np.uint32]:
    """Return 100 minima a set, each over another multiplication of the grams' upper halves modulo 2**32."""
    factors = [np.uint32(word_hash(f"minhash {k}") | 1) for k in range(_NUM_HASHES)]
    signatures = np.zeros((len(sets.lengths), _NUM_HASHES), np.uint32)
    nonempty = np.flatnonzero(sets.lengths)
    for part in batches(sets.lengths[nonempty], at_most=_GRAMS_PER_BATCH):
        rows = nonempty[part]
        lengths = sets.lengths[rows]
        halves = (sets.grams[joined_ranges(sets.starts[rows], lengths)] >> HALF).astype(np.uint32)
        starts = np.cumsum(lengths) - lengths
        for k, factor in enumerate(factors):
            signatures[rows, k] = np.minimum.reduceat(halves * factor, starts)
    return signatures


def _alike(signatures: NDArray[np.uint32], left: Indices, right: Indices) -> NDArray[np.bool_]:
    """Tell for each pair of sets whether enough rows of their signatures agree to be worth verifying."""
    alike = np.zeros(len(left), np.bool_)
    for start in range(0, len(left), _PAIRS_PER_BATCH):
        part = slice(start, start + _PAIRS_PER_BATCH)
        agreeing = np.count_nonzero(signatures[left[part]] == signatures[right[part]], axis=1)
        alike[part] = agreeing >= _LEAST_AGREEING
    return alike


def _buckets(signatures: NDArray[np.uint32], *, nonempty: Indices) -> _Buckets:
    members, numbers, num_buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for band in range(_NUM_BANDS):
        keys = np.zeros(len(nonempty), np.uint64)
        for k in range(_ROWS_PER_BAND):
            keys *= MULTIPLIER
            keys += signatures[nonempty, band * _ROWS_PER_BAND + k]
            keys ^= keys >> HALF
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = run_starts(keys)
        sizes = np.diff(starts, append=len(keys))
        shared = np.repeat(sizes > 1, sizes)
        members.append(nonempty[order][shared])
        numbers.append(np.repeat(np.arange(len(starts)) + num_buckets, sizes)[shared])
        num_buckets += len(starts)
    return _Buckets(np.concatenate(members), np.concatenate(numbers))


def _unsettled(buckets: _Buckets, labels: Indices, *, distance: int) -> _Buckets:
    """Return the buckets that have pairs `distance` apart and members which are not yet connected."""
    if not len(buckets.members):
        return buckets
    starts = run_starts(buckets.numbers)
    sizes = np.diff(starts, append=len(buckets.members))
    member_labels = labels[buckets.members]
    mixed = np.minimum.reduceat(member_labels, starts) != np.maximum.reduceat(member_labels, starts)
    kept = np.repeat(mixed & (sizes > distance), sizes)
    return _Buckets(buckets.members[kept], buckets.numbers[kept])


def _jaccard(sets: _GramSets, left: Indices, right: Indices) -> NDArray[np.float64]:
    """Return the Jaccard similarity of each pair of sets."""
    lengths, common = sets.lengths, np.zeros(len(left), np.int64)
    for rows in batches(lengths[left] + lengths[right], at_most=_GRAMS_PER_BATCH):
        keys = np.sort(np.concatenate([_pair_keys(sets, left[rows]), _pair_keys(sets, right[rows])]))
        numbers = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(_GRAM_BITS)
        common[rows] = np.bincount(numbers.astype(np.int64), minlength=rows.stop - rows.start)
    return common / (lengths[left] + lengths[right] - common)


def _pair_keys(sets: _GramSets, side: Indices) -> Hashes:
    """Return the grams of the sets on one side of the pairs, each with the pair's number above its 46 lower bits."""
    lengths = sets.lengths[side]
    grams = sets.grams[joined_ranges(sets.starts[side], lengths)]
    numbers = np.repeat(np.arange(len(side), dtype=np.uint64), lengths)
    return (numbers << np.uint64(_GRAM_BITS)) | (grams >> np.uint64(64 - _GRAM_BITS))


def jaccard(first: str, second: str) -> float:
    """Return the Jaccard similarity of two texts by the n-grams of `near_duplicates`, stock wording included."""
    grams = [_grams(text, hash_of=functools.cache(word_hash)) for text in (first, second)]
    return len(np.intersect1d(*grams, assume_unique=True)) / len(np.union1d(*grams))
