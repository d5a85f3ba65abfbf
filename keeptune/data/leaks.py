"""Records and their splits arrive; train records that overlap with what was held out leave, by kind of overlap.

The words of all texts, hashed, lie on the disk; memory holds a few numbers a record, and the n-grams of one batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from keeptune.data.clean import STOCK_FLOOR, jaccard
from keeptune.data.disk import DiskArray, chosen
from keeptune.data.groups import Members
from keeptune.data.heap import gives_back_freed
from keeptune.data.ngrams import (
    Hashes,
    Indices,
    batches,
    contained,
    distinct,
    frequent,
    joined_ranges,
    ngram_hashes,
    run_starts,
)
from keeptune.data.record import Record
from keeptune.data.split import TRAIN, SplitNumbers
from keeptune.data.word_texts import (
    COVER_WORDS,
    WORDS_PER_BATCH,
    Commonness,
    Grams,
    GramTable,
    Texts,
    grams_of,
    hashed,
    row_batches,
)

LeakKind = Literal["exact", "near", "ngram_cover", "ngram_13"]
LEAK_KINDS: tuple[LeakKind, ...] = get_args(LeakKind)

_COVER_SHARE, _LONG_WORDS = 0.5, 13
_STOCK_FRACTION = 0.1
_MAX_WITNESSES = 16
_WORDS_PER_CHUNK = 1 << 20
_OVERLAPS_PER_BATCH = 1 << 19


@dataclass(frozen=True, slots=True)
class Leaks:
    """Train records that overlap with a held-out one, ascending by number, each under the first kind that holds.

    `kinds` are places in `LEAK_KINDS`. exact: the same normalised prompt. near: in one group of near-duplicates; the
    overlap is the Jaccard similarity of the two prompts. ngram_cover: that fraction of the held-out record's words,
    more than half, stands in runs of 8 words that the train record has too, each word counted by how few groups have
    its runs (see `find_leaks`). ngram_13: the same for 13 words, where any fraction counts; such a record is no leak to
    remove.
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

    def leaks(self) -> Leaks:
        """Return what was found."""
        train = np.flatnonzero(self.kinds >= 0).astype(np.int32)
        return Leaks(train, self.held_out[train], self.kinds[train], self.overlap_fractions[train])


@dataclass(frozen=True, slots=True)
class _Shared:
    """N-grams of train texts that may stand in a held-out one, each with its text."""

    hashes: DiskArray[np.uint64]
    texts: DiskArray[np.int32]

    def blocks(self) -> Iterator[tuple[Hashes, Members]]:
        """Yield them, as many as memory may hold at a time."""
        for start in range(0, len(self.hashes), WORDS_PER_BATCH):
            starts, lengths = np.array([start]), np.array([min(WORDS_PER_BATCH, len(self.hashes) - start)])
            yield self.hashes.ranges(starts, lengths), self.texts.ranges(starts, lengths)


@dataclass(frozen=True, slots=True)
class _Postings:
    """Which train texts have an n-gram: of `grams[g]`, `texts[starts[g]:starts[g + 1]]`.

    N-grams of equal `classes` are in the same texts.
    """

    grams: Hashes
    classes: Hashes
    starts: Indices
    texts: Indices


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs `[starts, ends)` of held-out words whose n-grams, `grams` the first, are all in the same train texts."""

    owners: Indices
    starts: Indices
    ends: Indices
    grams: Indices


@gives_back_freed
def find_leaks(
    records: Sequence[Record], *, keys: Hashes, groups: Members, splits: SplitNumbers, scratch: Path | None = None
) -> Leaks:
    """Return at most one leak for each train record.

    `keys` are those of the prompts, `groups` the group of each record. Runs of words are sought in prompts against
    prompts and in completions against completions of 20 words or more. Runs in more than a tenth of a task's texts (and
    in more than 10) are wording of its template and cover nothing; words that only they reach do not count, and a text
    with fewer than 8 other words is not looked at.

    Wording that many records share says little about any one of them: a greeting, a signature, a disclaimer stand in
    records whose subjects differ. So a word counts the less the more groups of train records have the wording that it
    stands in (see `Commonness`), in what is covered and in the whole alike; a record of which nothing else is left is
    covered whatever its words count. Files lie in `scratch` for as long as the search takes, by default where the
    system has them.
    """
    found = _Found(len(records))
    is_train = splits == TRAIN
    if is_train.all() or not is_train.any():
        return found.leaks()
    _find_group_leaks(records, found, keys=keys, groups=groups, splits=splits)
    held_out = np.flatnonzero(~is_train)
    kinds: tuple[tuple[LeakKind, int, float], ...] = (
        ("ngram_cover", COVER_WORDS, _COVER_SHARE),
        ("ngram_13", _LONG_WORDS, 0.0),
    )
    with tempfile.TemporaryDirectory(dir=scratch, prefix="leaks-") as folder:
        sides, tasks = hashed(records, scratch=Path(folder))
        for kind, n, above in kinds:
            for texts in sides:
                train = np.flatnonzero(is_train & (found.kinds < 0))
                stock = distinct(np.concatenate([_stock(texts, rows, n=n) for rows in tasks]))
                shared = _shared(texts, n=n, train=train, held_out=held_out, stock=stock, scratch=Path(folder))
                common = Commonness(texts, groups=groups, train=train, held_out=held_out)
                covers = {"n": n, "above": above, "held_out": held_out, "stock": stock, "common": common}
                witnesses, shares = _covers(texts, shared, **covers)
                covering = np.flatnonzero(shares > 0)
                found.kinds[covering] = LEAK_KINDS.index(kind)
                found.held_out[covering] = witnesses[covering]
                found.overlap_fractions[covering] = shares[covering]
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


def _stock(texts: Texts, rows: Indices, *, n: int) -> Hashes:
    """Return, ascending, the n-grams in more than a tenth of one task's texts and in more than 10.

    What stands in more than a tenth of all stands in more than a tenth of some batch, so only that is counted.
    """
    parts = row_batches(texts, rows)
    often = [frequent(grams_of(texts, part, n=n).hashes, above=_STOCK_FRACTION * len(part)) for part in parts]
    candidates = distinct(np.concatenate([np.zeros(0, np.uint64), *often]))
    counts = np.zeros(len(candidates), np.int64)
    for part in parts:
        grams = grams_of(texts, part, n=n)
        codes = _codes(grams.hashes, grams.owners, among=candidates, num_owners=len(part))
        counts += np.bincount(codes // len(part), minlength=len(candidates))
    return candidates[counts > max(STOCK_FLOOR, _STOCK_FRACTION * len(rows))]


def _codes(hashes: Hashes, owners: NDArray[np.integer], *, among: Hashes, num_owners: int) -> Indices:
    """Return, ascending and once each, (index in `among`) * num_owners + owner of the hashes that stand there."""
    inside = contained(hashes, among)
    return distinct(np.searchsorted(among, hashes[inside]) * num_owners + owners[inside])


def _shared(texts: Texts, *, n: int, train: Indices, held_out: Indices, stock: Hashes, scratch: Path) -> _Shared:
    """Return the n-grams that train texts share with held-out ones; a few others come with them."""
    seen = GramTable(texts, held_out, n=n)
    shared = _Shared(DiskArray(scratch / "shared.u64", np.uint64), DiskArray(scratch / "shared.i32", np.int32))
    for part in row_batches(texts, train):
        grams = grams_of(texts, part, n=n)
        kept = np.flatnonzero(seen.may_hold(grams.hashes))
        kept = kept[~contained(grams.hashes[kept], stock)]
        shared.hashes.append(grams.hashes[kept])
        shared.texts.append(part[grams.owners[kept]].astype(np.int32))
    return shared


def _covers(
    texts: Texts,
    shared: _Shared,
    *,
    n: int,
    above: float,
    held_out: Indices,
    stock: Hashes,
    common: Commonness,
) -> tuple[Members, NDArray[np.float64]]:
    """Return for every text the held-out one that it covers best, and the share, 0 where it is not above `above`."""
    witnesses, shares = np.zeros(len(texts.lengths), np.int32), np.zeros(len(texts.lengths))
    for chunk in batches(texts.lengths[held_out], at_most=_WORDS_PER_CHUNK):
        rows = held_out[chunk]
        postings = _postings(texts, shared, n=n, held_out=rows)
        for part in row_batches(texts, rows):
            grams = grams_of(texts, part, n=n)
            weights = common.word_weights(texts, part)
            for k in range(n):
                weights[grams.places[contained(grams.hashes, stock)] + k] = 0.0
            # The weight before each place: the difference of two entries is that between two places.
            before = np.concatenate([[0.0], np.cumsum(weights)])
            ends = np.cumsum(texts.lengths[part])
            starts = ends - texts.lengths[part]
            num_counted = np.concatenate([[0], np.cumsum(weights > 0)])
            totals = np.where(num_counted[ends] - num_counted[starts] >= COVER_WORDS, before[ends] - before[starts], 0)
            for covering, owners, found in _best_shares(postings, grams, n=n, before=before, totals=totals):
                better = found > np.maximum(above, shares[covering])
                shares[covering[better]] = found[better]
                witnesses[covering[better]] = part[owners[better]]
    return witnesses, shares


def _postings(texts: Texts, shared: _Shared, *, n: int, held_out: Indices) -> _Postings:
    """Return the n-grams of held-out texts that stand in train texts, and in which."""
    parts = [grams_of(texts, part, n=n).hashes for part in row_batches(texts, held_out)]
    wanted = distinct(np.concatenate([np.zeros(0, np.uint64), *parts]))
    num_texts = len(texts.lengths)
    codes = [np.zeros(0, np.int64)]
    for hashes, owners in shared.blocks():
        codes.append(_codes(hashes, owners, among=wanted, num_owners=num_texts))
    joined = distinct(np.concatenate(codes))
    posted, indices = joined % num_texts, joined // num_texts
    starts = run_starts(indices)
    # Two n-grams with the same sum of random numbers, one a text, are in the same texts.
    random = ngram_hashes(posted.astype(np.uint32), 1)
    classes = np.add.reduceat(random, starts) if len(starts) else random
    return _Postings(wanted[indices[starts]], classes, np.append(starts, len(posted)), posted)


def _runs(postings: _Postings, grams: Grams, *, n: int) -> _Runs:
    shared = contained(grams.hashes, postings.grams)
    owners, places = grams.owners[shared], grams.places[shared]
    indices = np.searchsorted(postings.grams, grams.hashes[shared])
    classes = postings.classes[indices]
    broken = np.ones(len(owners), np.bool_)
    broken[1:] = (owners[1:] != owners[:-1]) | (places[1:] != places[:-1] + 1) | (classes[1:] != classes[:-1])
    first = np.flatnonzero(broken)
    last = np.append(first[1:], len(owners))[: len(first)] - 1
    return _Runs(owners[first], places[first], places[last] + n, indices[first])


def _best_shares(
    postings: _Postings, grams: Grams, *, n: int, before: NDArray[np.float64], totals: NDArray[np.float64]
) -> Iterator[tuple[Indices, Indices, NDArray[np.float64]]]:
    """Yield train texts, the numbers of held-out ones and the shares of their weight that is covered, batch by batch.

    `totals` is the weight of each held-out text, 0 where it is not to be looked at. A batch has a train
    text once, with the held-out text that it covers best.
    """
    runs = _runs(postings, grams, n=n)
    sizes = np.diff(postings.starts)[runs.grams]
    # The runs of one held-out text stay in one batch.
    firsts = run_starts(runs.owners)
    num_overlaps = np.add.reduceat(sizes, firsts) if len(firsts) else sizes
    edges = np.append(firsts, len(runs.owners))
    num_texts = int(postings.texts.max(initial=0)) + 1
    for part in batches(num_overlaps, at_most=_OVERLAPS_PER_BATCH):
        rows = slice(edges[part.start], edges[part.stop])
        counts = sizes[rows]
        covering = postings.texts[joined_ranges(postings.starts[runs.grams[rows]], counts)]
        keys = np.repeat(runs.owners[rows], counts) * num_texts + covering
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts, ends = np.repeat(runs.starts[rows], counts)[order], np.repeat(runs.ends[rows], counts)[order]
        pairs = run_starts(keys)
        # Runs ascend and overlap by up to n - 1 words: what the one before covered counts once.
        begins = np.maximum(starts, np.append(0, ends[:-1]))
        begins[pairs] = starts[pairs]
        covered = np.add.reduceat(before[ends] - before[begins], pairs)
        owners, covering = keys[pairs] // num_texts, keys[pairs] % num_texts
        shares = np.where(totals[owners] > 0, np.minimum(covered / np.where(totals > 0, totals, 1.0)[owners], 1.0), 0.0)
        order = np.lexsort((owners, -shares, covering))
        best = order[run_starts(covering[order])]
        yield covering[best], owners[best], shares[best]
