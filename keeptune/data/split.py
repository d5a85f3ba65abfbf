"""Records arrive; each gets its split by the hash of its group, and train is held against what was held out.

A group is what near-duplicate links and equal prompts join, over all tasks; its key is the smallest prompt key in it.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from keeptune.data.clean import STOCK_FLOOR, NearDuplicates, find, jaccard, prompt_key, union
from keeptune.data.ngrams import (
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
from keeptune.data.record import PartName, Record, SplitName

LeakKind = Literal["exact", "near", "ngram_cover", "ngram_13"]
LEAK_KINDS: tuple[LeakKind, ...] = get_args(LeakKind)

_COVER_WORDS, _COVER_SHARE, _LONG_WORDS = 8, 0.5, 13
_LEAST_COMPLETION_WORDS = 20
_STOCK_FRACTION = 0.1
_MAX_WITNESSES = 16
_WORDS_PER_BATCH = 1 << 18
_OVERLAPS_PER_BATCH = 1 << 19


@dataclass(frozen=True, slots=True)
class Assigned:
    """One split and one group key a record.

    `num_joined` prompts follow another prompt's key because they are near-duplicates of it; `num_moved` records are in
    another split than their own prompt alone would be. `largest_group` counts records.
    """

    splits: list[SplitName]
    groups: list[str]
    num_groups: int
    num_joined: int
    num_moved: int
    largest_group: int


@dataclass(frozen=True, slots=True)
class Leak:
    """A train record that overlaps with a held-out one, under the first kind of `LEAK_KINDS` that holds.

    exact: the same normalised prompt. near: in one group of near-duplicates; `overlap_fraction` is the Jaccard
    similarity of the two prompts. ngram_cover: `overlap_fraction` of the held-out record's words, more than half,
    stands in runs of 8 words that the train record has too. ngram_13: the same for 13 words, where any fraction
    counts; such a record is no leak to remove.
    """

    train_id: str
    held_out_id: str
    split: SplitName
    kind: LeakKind
    overlap_fraction: float


@dataclass(frozen=True, slots=True)
class _Texts:
    """The words of all texts, hashed: those of text i are `lengths[i]` of `words` from `starts[i]` on."""

    words: NDArray[np.uint32]
    starts: Indices
    lengths: Indices


@dataclass(frozen=True, slots=True)
class _Grams:
    """The word n-grams of some texts, laid end to end: hash, number of its text there, place of its first word."""

    hashes: Hashes
    owners: Indices
    places: Indices


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


def split_name(group: str, *, seed: int, validation_fraction: float, test_fraction: float) -> SplitName:
    """Assign a group of near-duplicates to one split, whatever else is in the data."""
    place = _place(f"{seed} {group}")
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def part_name(group: str, *, seed: int, shares: Mapping[PartName, float]) -> PartName | None:
    """Assign a suite's group to a part, by expected share; None is the rest, which is reported on."""
    place = _place(f"{seed} part {group}")
    for part, share in shares.items():
        if place < share:
            return part
        place -= share
    return None


def _place(text: str) -> float:
    """Return a number in [0, 1) that is uniform over texts and the same for equal ones."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def assign_splits(
    records: Sequence[Record],
    *,
    near: NearDuplicates,
    fixed: Sequence[SplitName | None],
    seed: int,
    validation_fraction: float,
    test_fraction: float,
) -> Assigned:
    """Assign every record to a split; no group straddles splits but where own files (`fixed`) make it so.

    A record of an own file keeps that file's split. A group with such a record is not carved: its other records go to
    train, where `find_leaks` sees them. So does a group that is drawn for a split which a task of it brings along as a
    file of its own.
    """
    keys = [prompt_key(record) for record in records]
    groups = _group_keys(keys, near=near)
    own: defaultdict[str, set[SplitName]] = defaultdict(set)
    for record, split in zip(records, fixed, strict=True):
        if split is not None:
            own[record.task].add(split)
    drawn: dict[str, SplitName] = {}
    for key in set(keys):
        drawn[key] = split_name(key, seed=seed, validation_fraction=validation_fraction, test_fraction=test_fraction)
    by_group: dict[str, SplitName] = {group: drawn[group] for group in groups}
    for record, group, split in zip(records, groups, fixed, strict=True):
        if split is not None or drawn[group] in own[record.task]:
            by_group[group] = "train"
    sizes: defaultdict[str, int] = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    return Assigned(
        splits=[split or by_group[group] for group, split in zip(groups, fixed, strict=True)],
        groups=groups,
        num_groups=len(sizes),
        num_joined=len(set(keys)) - len(sizes),
        num_moved=sum(drawn[key] != drawn[group] for key, group in zip(keys, groups, strict=True)),
        largest_group=max(sizes.values(), default=0),
    )


def _group_keys(keys: Sequence[str], *, near: NearDuplicates) -> list[str]:
    """Return for each record the smallest key of its group."""
    parents = list(range(len(keys)))
    first_of: dict[str, int] = {}
    for i, key in enumerate(keys):
        union(parents, first_of.setdefault(key, i), i)
        union(parents, near.groups[i], i)
    smallest: dict[int, str] = {}
    roots = [find(parents, i) for i in range(len(keys))]
    for root, key in zip(roots, keys, strict=True):
        smallest[root] = min(smallest.get(root, key), key)
    return [smallest[root] for root in roots]


def find_leaks(records: Sequence[Record], *, splits: Sequence[SplitName], near: NearDuplicates) -> list[Leak]:
    """Return at most one leak for each train record, in the records' order.

    Runs of words are sought in prompts against prompts and in completions against completions of 20 words or more.
    Runs in more than a tenth of a task's texts (and in more than 10) are wording of its template and cover nothing;
    words that only they reach do not count, and a text with fewer than 8 other words is not looked at.
    """
    leaks = _group_leaks(records, splits=splits, near=near)
    is_train = np.array([split == "train" for split in splits], np.bool_)
    if is_train.all() or not is_train.any():
        return []
    by_task: defaultdict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        by_task[record.task].append(i)
    tasks = [np.array(members, np.int64) for members in by_task.values()]
    sides = (
        _hashed([record.prompt for record in records], least_words=_COVER_WORDS),
        _hashed([record.completion for record in records], least_words=_LEAST_COMPLETION_WORDS),
    )
    held_out = np.flatnonzero(~is_train)
    kinds: tuple[tuple[LeakKind, int, float], ...] = (
        ("ngram_cover", _COVER_WORDS, _COVER_SHARE),
        ("ngram_13", _LONG_WORDS, 0.0),
    )
    for kind, n, above in kinds:
        for texts in sides:
            train = np.array([i for i in np.flatnonzero(is_train) if i not in leaks], np.int64)
            stock = distinct(np.concatenate([_stock(texts, rows, n=n) for rows in tasks]))
            covers = _covers(texts, n=n, above=above, train=train, held_out=held_out, stock=stock)
            for i, (j, share) in covers.items():
                leaks[i] = Leak(records[i].id, records[j].id, splits[j], kind, share)
    return [leaks[i] for i in sorted(leaks)]


def _group_leaks(records: Sequence[Record], *, splits: Sequence[SplitName], near: NearDuplicates) -> dict[int, Leak]:
    """Return a leak of kind exact or near for each train record in one group with a held-out record."""
    keys = [prompt_key(record) for record in records]
    groups = _group_keys(keys, near=near)
    held_out: defaultdict[str, list[int]] = defaultdict(list)
    for i, split in enumerate(splits):
        if split != "train":
            held_out[groups[i]].append(i)
    leaks: dict[int, Leak] = {}
    for i, split in enumerate(splits):
        if split != "train" or groups[i] not in held_out:
            continue
        others = held_out[groups[i]]
        same = next((j for j in others if keys[j] == keys[i]), None)
        if same is not None:
            leaks[i] = Leak(records[i].id, records[same].id, splits[same], "exact", 1.0)
        else:
            share, j = max((jaccard(records[i].prompt, records[j].prompt), j) for j in others[:_MAX_WITNESSES])
            leaks[i] = Leak(records[i].id, records[j].id, splits[j], "near", share)
    return leaks


def _hashed(texts: Sequence[str], *, least_words: int) -> _Texts:
    """Return the texts as hashed words; a text of fewer than `least_words` words counts as empty."""
    hash_of = functools.cache(word_hash)
    buffer, lengths = bytearray(), []
    for text in texts:
        found = words(normalised(text))
        found = found if len(found) >= least_words else []
        buffer += np.fromiter(map(hash_of, found), np.uint32, len(found)).tobytes()
        lengths.append(len(found))
    sizes = np.array(lengths, np.int64)
    return _Texts(np.frombuffer(buffer, np.uint32), np.cumsum(sizes) - sizes, sizes)


def _grams_of(texts: _Texts, rows: Indices, *, n: int) -> _Grams:
    """Return the n-grams of the given texts, text after text, each text's in order."""
    lengths = texts.lengths[rows]
    symbols = texts.words[joined_ranges(texts.starts[rows], lengths)]
    counts = np.maximum(lengths - n + 1, 0)
    places = joined_ranges(np.cumsum(lengths) - lengths, counts)
    return _Grams(ngram_hashes(symbols, n)[places], np.repeat(np.arange(len(rows)), counts), places)


def _row_batches(texts: _Texts, rows: Indices) -> list[Indices]:
    return [rows[part] for part in batches(texts.lengths[rows], at_most=_WORDS_PER_BATCH)]


def _stock(texts: _Texts, rows: Indices, *, n: int) -> Hashes:
    """Return, ascending, the n-grams in more than a tenth of one task's texts and in more than 10.

    What stands in more than a tenth of all stands in more than a tenth of some batch, so only that is counted.
    """
    parts = _row_batches(texts, rows)
    often = [frequent(_grams_of(texts, part, n=n).hashes, above=_STOCK_FRACTION * len(part)) for part in parts]
    candidates = distinct(np.concatenate([np.zeros(0, np.uint64), *often]))
    counts = np.zeros(len(candidates), np.int64)
    for part in parts:
        grams = _grams_of(texts, part, n=n)
        codes = _codes(grams.hashes, grams.owners, among=candidates, num_owners=len(part))
        counts += np.bincount(codes // len(part), minlength=len(candidates))
    return candidates[counts > max(STOCK_FLOOR, _STOCK_FRACTION * len(rows))]


def _codes(hashes: Hashes, owners: Indices, *, among: Hashes, num_owners: int) -> Indices:
    """Return, ascending and once each, (index in `among`) * num_owners + owner of the hashes that stand there."""
    inside = contained(hashes, among)
    return distinct(np.searchsorted(among, hashes[inside]) * num_owners + owners[inside])


def _covers(
    texts: _Texts, *, n: int, above: float, train: Indices, held_out: Indices, stock: Hashes
) -> dict[int, tuple[int, float]]:
    """Return for train texts the held-out text that they cover best, and the share, where it is more than `above`."""
    wanted = np.zeros(0, np.uint64)
    for part in _row_batches(texts, held_out):
        wanted = np.concatenate([wanted, distinct(_grams_of(texts, part, n=n).hashes)])
    wanted = distinct(wanted)
    postings = _postings(texts, train, n=n, wanted=wanted[~contained(wanted, stock)])
    best: dict[int, tuple[int, float]] = {}
    for part in _row_batches(texts, held_out):
        grams = _grams_of(texts, part, n=n)
        is_counted = np.ones(int(texts.lengths[part].sum()), np.bool_)
        for k in range(n):
            is_counted[grams.places[contained(grams.hashes, stock)] + k] = False
        # Counted words before each place: the difference of two entries is their number between two places.
        before = np.concatenate([[0], np.cumsum(is_counted)])
        ends = np.cumsum(texts.lengths[part])
        num_counted = before[ends] - before[ends - texts.lengths[part]]
        for i, owner, share in _best_shares(postings, grams, n=n, before=before, num_counted=num_counted):
            if share > max(above, best.get(i, (0, 0.0))[1]):
                best[i] = (int(part[owner]), share)
    return best


def _postings(texts: _Texts, rows: Indices, *, n: int, wanted: Hashes) -> _Postings:
    """Return the wanted n-grams that stand in the given texts, and in which."""
    num_texts = len(texts.lengths)
    codes = [np.zeros(0, np.int64)]
    for part in _row_batches(texts, rows):
        grams = _grams_of(texts, part, n=n)
        codes.append(_codes(grams.hashes, part[grams.owners], among=wanted, num_owners=num_texts))
    joined = np.sort(np.concatenate(codes))
    posted, indices = joined % num_texts, joined // num_texts
    starts = run_starts(indices)
    # Two n-grams with the same sum of random numbers, one a text, are in the same texts.
    random = ngram_hashes(np.arange(num_texts, dtype=np.uint32), 1)[posted]
    classes = np.add.reduceat(random, starts) if len(starts) else random
    return _Postings(wanted[indices[starts]], classes, np.append(starts, len(posted)), posted)


def _runs(postings: _Postings, grams: _Grams, *, n: int) -> _Runs:
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
    postings: _Postings, grams: _Grams, *, n: int, before: Indices, num_counted: Indices
) -> Iterator[tuple[int, int, float]]:
    """Yield (train text, number of the held-out text, share of its counted words covered), the best of each batch."""
    runs = _runs(postings, grams, n=n)
    sizes = np.diff(postings.starts)[runs.grams]
    # The runs of one held-out text stay in one batch.
    firsts = run_starts(runs.owners)
    totals = np.add.reduceat(sizes, firsts) if len(firsts) else sizes
    edges = np.append(firsts, len(runs.owners))
    num_texts = int(postings.texts.max(initial=0)) + 1
    for part in batches(totals, at_most=_OVERLAPS_PER_BATCH):
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
        shares = np.where(num_counted[owners] >= _COVER_WORDS, covered / np.maximum(num_counted[owners], 1), 0.0)
        order = np.lexsort((owners, -shares, covering))
        for k in order[run_starts(covering[order])]:
            yield int(covering[k]), int(owners[k]), float(shares[k])
