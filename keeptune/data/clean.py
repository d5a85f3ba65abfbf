"""Texts arrive; keys of exact copies and verified near-duplicates leave, each a function of content, not of order.

Two texts are near-duplicates by what they hold alone, so that no third text can break a link, with one exception: what
counts as the wording of a task's template depends on how many of its texts have it, so rows that carry it past half of
them, or back, change links. The n-grams of all texts lie on the disk; memory holds a few numbers a text.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keeptune.data.disk import DiskArray
from keeptune.data.groups import Members, roots, union
from keeptune.data.heap import gives_back_freed
from keeptune.data.minhash import GRAMS_PER_BATCH, GramSets, verified_links
from keeptune.data.ngrams import (
    Hashes,
    Indices,
    WordHashes,
    batches,
    contained,
    distinct,
    frequent,
    ngram_hashes,
    normalised,
    run_starts,
    words,
)
from keeptune.data.record import Record

_SHORT_WORDS = 20
STOCK_FLOOR = 10
_STOCK_FRACTION = 0.5


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Links between near-duplicate texts and the groups that they make.

    The rows of `pairs`, (number of pairs, 2), are a spanning forest: each is verified, none closes a circle, so of a
    group of n texts n - 1 pairs are listed, ascending. `similarities` holds the Jaccard similarity of each pair;
    `groups` for each text the first text of its group.
    """

    pairs: NDArray[np.int32]
    similarities: NDArray[np.float64]
    groups: Members


def prompt_key(record: Record) -> str:
    """Return 32 hexadecimal digits that depend on the normalised prompt alone."""
    return digest(normalised(record.prompt)).hex()


def exact_key(record: Record) -> str:
    """Return 32 hexadecimal digits that depend on the normalised prompt and completion alone."""
    return digest(f"{normalised(record.prompt)}\0{normalised(record.completion)}").hex()


def digest(text: str | bytes) -> bytes:
    """Return 16 bytes that depend on the text alone."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return hashlib.blake2b(content, digest_size=16).digest()


def key_numbers(digests: bytes | bytearray | NDArray[np.uint8]) -> Hashes:
    """Return the digests, laid end to end, as two numbers each, (number of digests, 2), in the order of their bytes."""
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


@gives_back_freed
def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float = 0.8,
    tasks: Sequence[str] | None = None,
    scratch: Path | None = None,
) -> NearDuplicates:
    """Link texts whose n-gram sets have a Jaccard similarity of at least `threshold` (0.8 or more).

    The n-grams are those of 3 words, or of 5 characters where a text has fewer than 20 words. With `tasks` (one a
    text), n-grams in more than half of a task's texts (and in more than 10) are left out: they are the wording of its
    template, beside which two different inputs would look alike and one input under two templates would not. Files lie
    in `scratch` for as long as the search takes, by default where the system has them.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="near-") as folder:
        sets, keys = _gram_sets(texts, tasks=tasks, scratch=Path(folder))
        links = verified_links(sets, threshold=threshold, scratch=Path(folder))
    parents = first_of_equals(keys)
    twins = np.flatnonzero(parents != np.arange(len(texts))).astype(np.int32)
    pairs, similarities = [np.stack([parents[twins], twins], axis=1)], [np.ones(len(twins))]
    ends = np.sort(np.stack([sets.texts[links.first], sets.texts[links.second]], axis=1), axis=1)
    kept = np.array([union(parents, int(i), int(j)) for i, j in ends], np.bool_)
    pairs.append(ends[kept])
    similarities.append(links.similarities[kept])
    joined, values = np.concatenate(pairs), np.concatenate(similarities)
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    return NearDuplicates(joined[order], values[order], roots(parents))


def _gram_sets(texts: Sequence[str], *, tasks: Sequence[str] | None, scratch: Path) -> tuple[GramSets, Hashes]:
    """Return a gram set for each distinct text of a task that has any left, and a key of the grams of each text."""
    hashes = WordHashes()
    numbers = {task: number for number, task in enumerate(sorted(set(tasks or [""])))}
    codes = np.fromiter((numbers[task] for task in tasks), np.int32) if tasks else np.zeros(len(texts), np.int32)
    by_task = np.argsort(codes, kind="stable").astype(np.int32)
    keys = np.zeros((len(texts), 2), np.uint64)
    grams = DiskArray(scratch / "grams.u64", np.uint64)
    lengths, members = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for number, rows in enumerate(np.split(by_task, run_starts(codes[by_task])[1:])):
        raw, sizes = DiskArray(scratch / f"task-{number}.u64", np.uint64), np.empty(len(rows), np.int64)
        is_short = np.empty(len(rows), np.bool_)
        digests = bytearray()
        for k, i in enumerate(map(int, rows)):
            found, is_short[k] = _grams(texts[i], hashes=hashes)
            content = found.tobytes()
            digests += digest(content)
            sizes[k] = len(content) // 8
            raw.append(content)
        keys[rows] = key_numbers(digests)
        firsts = np.flatnonzero(first_of_equals(keys[rows]) == np.arange(len(rows)))
        starts = np.cumsum(sizes) - sizes
        # Short texts and others have no n-grams in common: what is usual is asked of each kind by itself.
        kinds = [firsts[is_short[firsts] == short] for short in (False, True)] if tasks else []
        stock = [np.zeros(0, np.uint64), *(_stock(_Sets(raw, starts[kind], sizes[kind])) for kind in kinds)]
        sets = _Sets(raw, starts[firsts], sizes[firsts])
        lengths.append(_copied(sets, without=distinct(np.concatenate(stock)), to=grams))
        members.append(rows[firsts])
        raw.remove()
    all_lengths, all_texts = np.concatenate(lengths), np.concatenate(members)
    starts = np.cumsum(all_lengths) - all_lengths
    # The order of the keys, then of the tasks, is one of content.
    order = np.lexsort((keys[all_texts, 1], keys[all_texts, 0]))
    order = order[all_lengths[order] > 0]
    return GramSets(grams, starts[order], all_lengths[order].astype(np.int32), all_texts[order]), keys


def first_of_equals(keys: Hashes) -> Members:
    """Return for each key, (number of keys, 2), the index of the first that equals it."""
    order = np.lexsort((keys[:, 1], keys[:, 0])).astype(np.int32)
    ascending = keys[order]
    starts = np.flatnonzero(np.append(np.ones(1, np.bool_), (ascending[1:] != ascending[:-1]).any(axis=1))[: len(keys)])
    found = np.empty(len(keys), np.int32)
    found[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return found


@dataclass(frozen=True, slots=True)
class _Sets:
    """Those of set k are `lengths[k]` numbers of `grams` from `starts[k]` on."""

    grams: DiskArray[np.uint64]
    starts: Indices
    lengths: Indices

    def parts(self) -> Iterator[tuple[slice, Hashes]]:
        """Yield which sets come next, and their n-grams, as many as memory may hold at a time."""
        for part in batches(self.lengths, at_most=GRAMS_PER_BATCH):
            yield part, self.grams.ranges(self.starts[part], self.lengths[part])


def _stock(sets: _Sets) -> Hashes:
    """Return, ascending, the n-grams in more than half of the sets and in more than 10.

    What stands in more than half of all stands in more than half of some part, so only that is counted.
    """
    candidates = np.zeros(0, np.uint64)
    for part, grams in sets.parts():
        often = frequent(grams, above=_STOCK_FRACTION * (part.stop - part.start))
        candidates = distinct(np.concatenate([candidates, often]))
    counts = np.zeros(len(candidates), np.int64)
    for _, grams in sets.parts() if len(candidates) else ():
        found = np.searchsorted(candidates, grams[contained(grams, candidates)])
        counts += np.bincount(found, minlength=len(candidates))
    return candidates[counts > max(STOCK_FLOOR, _STOCK_FRACTION * len(sets.lengths))]


def _copied(sets: _Sets, *, without: Hashes, to: DiskArray[np.uint64]) -> Indices:
    """Append the sets to a file without some n-grams; return how many are left of each."""
    lengths = sets.lengths.copy()
    for part, grams in sets.parts():
        dropped = contained(grams, without)
        to.append(grams[~dropped])
        owners = np.repeat(np.arange(part.stop - part.start), sets.lengths[part])
        lengths[part] -= np.bincount(owners[dropped], minlength=part.stop - part.start)
    return lengths


def _grams(text: str, *, hashes: WordHashes) -> tuple[Hashes, bool]:
    """Return the n-grams of a text, and whether they are those of a short one."""
    text = normalised(text)
    found = words(text)
    if len(found) >= _SHORT_WORDS:
        return distinct(ngram_hashes(hashes.of(found), 3)), False
    characters = np.frombuffer(text.ljust(5).encode("utf-32-le", "surrogatepass"), np.uint32)
    return distinct(ngram_hashes(characters, 5)), True


def jaccard(first: str, second: str) -> float:
    """Return the Jaccard similarity of two texts by the n-grams of `near_duplicates`, stock wording included."""
    grams = [_grams(text, hashes=WordHashes())[0] for text in (first, second)]
    return len(np.intersect1d(*grams, assume_unique=True)) / len(np.union1d(*grams))
