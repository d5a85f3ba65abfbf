"""Keep the hashed words of many texts on the disk, give their n-grams, and tell which of these no two groups share.

Memory holds a few numbers a text, and the n-grams of one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keeptune.data.disk import DiskArray
from keeptune.data.groups import Members
from keeptune.data.ngrams import (
    Hashes,
    Indices,
    WordHashes,
    batches,
    distinct,
    joined_ranges,
    ngram_hashes,
    normalised,
    run_starts,
    words,
)
from keeptune.data.record import Record

LEAST_WORDS = 8
WORDS_PER_BATCH = 1 << 17
_LEAST_COMPLETION = 20
# Two tables of 8 MiB tell which n-grams no two groups share: ten million n-grams fill a seventh of their bits.
_TABLE_BITS = 26


@dataclass(frozen=True, slots=True)
class Texts:
    """The words of all texts, hashed. Those of text i are `lengths[i]` of `words` from `starts[i]` on."""

    words: DiskArray[np.uint32]
    starts: Indices
    lengths: Indices


@dataclass(frozen=True, slots=True)
class Grams:
    """The word n-grams of some texts, laid end to end: hash, number of its text there, place of its first word."""

    hashes: Hashes
    owners: Indices
    places: Indices


def hashed(records: Sequence[Record], *, scratch: Path) -> tuple[Texts, list[Indices]]:
    """Return the prompts of all records, then their completions, as hashed words, and the texts of each task.

    Texts that are too short to be compared are empty. Prompts and completions of a task stand apart.
    """
    hashes = WordHashes()
    stored = DiskArray(scratch / "words.u32", np.uint32)
    starts, lengths = np.zeros((2, len(records)), np.int64), np.zeros((2, len(records)), np.int64)
    numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers))
    tasks = np.zeros(len(records), np.int32)
    for i, record in enumerate(records):
        tasks[i] = numbers[record.task]
        for side, (least, text) in enumerate(((LEAST_WORDS, record.prompt), (_LEAST_COMPLETION, record.completion))):
            found = words(normalised(text))
            if len(found) >= least:
                starts[side, i], lengths[side, i] = len(stored), len(found)
                stored.append(hashes.of(found))
    by_task = np.argsort(tasks, kind="stable")
    rows = np.split(by_task, run_starts(tasks[by_task])[1:])
    return Texts(stored, starts.ravel(), lengths.ravel()), [*rows, *(part + len(records) for part in rows)]


def grams_of(texts: Texts, rows: Indices, *, n: int) -> Grams:
    """Return the n-grams of the given texts, text after text, each text's in order."""
    lengths = texts.lengths[rows]
    symbols = texts.words.ranges(texts.starts[rows], lengths)
    counts = np.maximum(lengths - n + 1, 0)
    places = joined_ranges(np.cumsum(lengths) - lengths, counts)
    return Grams(ngram_hashes(symbols, n)[places], np.repeat(np.arange(len(rows)), counts), places)


def row_batches(texts: Texts, rows: Indices) -> list[Indices]:
    """Return the rows in parts, each with as many words as memory may hold at a time."""
    return [rows[part] for part in batches(texts.lengths[rows], at_most=WORDS_PER_BATCH)]


class SharedGrams:
    """Tells which n-grams cannot stand in texts of two groups; of the others a few do not either."""

    def __init__(self, texts: Texts, rows: Indices, *, groups: Members, n: int) -> None:
        once, again = (np.zeros(1 << (_TABLE_BITS - 3), np.uint8) for _ in range(2))
        num_texts = len(texts.lengths)
        # The texts of one group stand side by side: what they share among themselves does not count.
        for part in row_batches(texts, rows[np.argsort(groups[rows], kind="stable")]):
            grams = grams_of(texts, part, n=n)
            slots = distinct(_slots(grams.hashes) * num_texts + groups[part[grams.owners]]) // num_texts
            first = run_starts(slots)
            places, bits = _bits(slots[first])
            several = (np.diff(first, append=len(slots)) > 1) | ((once[places] & bits) > 0)
            np.bitwise_or.at(again, places[several], bits[several])
            np.bitwise_or.at(once, places, bits)
        self._again = again

    def may_hold(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Tell of each n-gram whether it may stand in texts of two groups."""
        places, bits = _bits(_slots(hashes))
        return (self._again[places] & bits) > 0


def _slots(hashes: Hashes) -> Indices:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _bits(slots: Indices) -> tuple[Indices, NDArray[np.uint8]]:
    """Return the byte of a table in which each slot has its bit, and that bit."""
    return slots >> 3, np.uint8(1) << (slots & 7).astype(np.uint8)
