"""Keep the hashed words of many texts on the disk, give their n-grams, and tell which wording many of them share.

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

COVER_WORDS = 8
WORDS_PER_BATCH = 1 << 17
_LEAST_COMPLETION_WORDS = 20
# A table of 16 MiB tells which n-grams train cannot share: ten million of held-out records fill a twelfth of its bits.
_TABLE_BITS = 27
# Wording is what stands in runs of three words; those of more groups than this are common.
_WORDING, _RARE_GROUPS = 3, 2
_WEIGHT_STEPS = 1 << 16
_COUNT_BITS = 23
_MOST = 255


@dataclass(frozen=True, slots=True)
class Texts:
    """The words of all texts, hashed: those of text i are `lengths[i]` of `words` from `starts[i]` on."""

    words: DiskArray[np.uint32]
    starts: Indices
    lengths: Indices


@dataclass(frozen=True, slots=True)
class Grams:
    """The word n-grams of some texts, laid end to end: hash, number of its text there, place of its first word."""

    hashes: Hashes
    owners: Indices
    places: Indices


def hashed(records: Sequence[Record], *, scratch: Path) -> tuple[tuple[Texts, Texts], list[Indices]]:
    """Return prompts and completions as hashed words, too short ones as empty, and the records of each task."""
    hashes = WordHashes()
    sides = [(COVER_WORDS, DiskArray(scratch / "prompts.u32", np.uint32), np.zeros(len(records), np.int64))]
    sides.append((_LEAST_COMPLETION_WORDS, DiskArray(scratch / "completions.u32", np.uint32), sides[0][2].copy()))
    numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers))
    tasks = np.zeros(len(records), np.int32)
    for i, record in enumerate(records):
        tasks[i] = numbers[record.task]
        for (least_words, stored, lengths), text in zip(sides, (record.prompt, record.completion), strict=True):
            found = words(normalised(text))
            if len(found) >= least_words:
                stored.append(hashes.of(found))
                lengths[i] = len(found)
    prompts, completions = (Texts(stored, np.cumsum(lengths) - lengths, lengths) for _, stored, lengths in sides)
    by_task = np.argsort(tasks, kind="stable")
    return (prompts, completions), np.split(by_task, run_starts(tasks[by_task])[1:])


def grams_of(texts: Texts, rows: Indices, *, n: int) -> Grams:
    """Return the n-grams of the given texts, text after text, each text's in order."""
    lengths = texts.lengths[rows]
    symbols = texts.words.ranges(texts.starts[rows], lengths)
    counts = np.maximum(lengths - n + 1, 0)
    places = joined_ranges(np.cumsum(lengths) - lengths, counts)
    return Grams(ngram_hashes(symbols, n)[places], np.repeat(np.arange(len(rows)), counts), places)


def row_batches(texts: Texts, rows: Indices) -> list[Indices]:
    return [rows[part] for part in batches(texts.lengths[rows], at_most=WORDS_PER_BATCH)]


class GramTable:
    """Tells which n-grams cannot stand in some texts; of the others a few do not either."""

    def __init__(self, texts: Texts, rows: Indices, *, n: int) -> None:
        self._bits = np.zeros(1 << (_TABLE_BITS - 3), np.uint8)
        for part in row_batches(texts, rows):
            places, bits = _places(grams_of(texts, part, n=n).hashes)
            np.bitwise_or.at(self._bits, places, bits)

    def may_hold(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Tell of each n-gram whether it may stand in one of the texts."""
        places, bits = _places(hashes)
        return (self._bits[places] & bits) > 0


def _places(hashes: Hashes) -> tuple[Indices, NDArray[np.uint8]]:
    """Return the byte of the table in which an n-gram has its bit, and that bit."""
    upper = hashes >> np.uint64(64 - _TABLE_BITS)
    return (upper >> np.uint64(3)).astype(np.int64), np.uint8(1) << (upper & np.uint64(7)).astype(np.uint8)


class Commonness:
    """How many groups of train texts have each run of three words of the held-out ones.

    A run that k groups have says of its words how much they count: (2 / k)², where k is above 2, and all where it is
    not. The counts are those of a table of 2²³ places, so that a rare run may be taken for a more common one.
    """

    def __init__(self, texts: Texts, *, groups: Members, train: Indices, held_out: Indices) -> None:
        self._counts = np.zeros(1 << _COUNT_BITS, np.uint8)
        seen = GramTable(texts, held_out, n=_WORDING)
        num_texts = len(texts.lengths)
        # The texts of one group stand side by side: what copies of one record share is not common.
        for part in row_batches(texts, train[np.argsort(groups[train], kind="stable")]):
            grams = grams_of(texts, part, n=_WORDING)
            shared = seen.may_hold(grams.hashes)
            owners = groups[part[grams.owners[shared]]]
            slots = distinct(_slots(grams.hashes[shared]) * num_texts + owners) // num_texts
            first = run_starts(slots)
            found = np.diff(first, append=len(slots)) + self._counts[slots[first]]
            self._counts[slots[first]] = np.minimum(found, _MOST)

    def word_weights(self, texts: Texts, rows: Indices) -> NDArray[np.float64]:
        """Return how much each word of the given texts counts, from 0 to 1: as the most common run that it is in."""
        grams = grams_of(texts, rows, n=_WORDING)
        counts = np.maximum(self._counts[_slots(grams.hashes)], _RARE_GROUPS)
        # A sum of multiples of one fraction is exact in any order.
        of_gram = np.ceil((_RARE_GROUPS / counts) ** 2 * _WEIGHT_STEPS) / _WEIGHT_STEPS
        weights = np.ones(int(texts.lengths[rows].sum()))
        # No two runs begin at one place.
        for k in range(_WORDING):
            weights[grams.places + k] = np.minimum(weights[grams.places + k], of_gram)
        return weights


def _slots(hashes: Hashes) -> Indices:
    return (hashes >> np.uint64(64 - _COUNT_BITS)).astype(np.int64)
