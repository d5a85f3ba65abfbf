"""A text arrives; its words and the hashes of its n-grams leave, as arrays that can be compared in bulk."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
_Integer = TypeVar("_Integer", np.uint64, np.int64)

# Scripts written without spaces: each of their characters is a word (Thai to Khmer, kana, Han).
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xD6E8FEB86659FD93)
HALF = np.uint64(32)
_WORDS_AT_HAND = 1 << 16


def normalised(text: str) -> str:
    """Return the text in Unicode's NFKC form, without case, each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Return the words of a normalised text; punctuation is none."""
    return _WORD.findall(text)


def word_hash(word: str) -> int:
    """Return 32 bits that depend on the word alone."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little")


class WordHashes(dict[str, int]):
    """The hashes of words, looked up like `hashes[word]`.

    A vocabulary grows with the data, and most words of it are rare: memory holds those met since it was last full.
    """

    def __missing__(self, word: str) -> int:
        if len(self) >= _WORDS_AT_HAND:
            self.clear()
        found = self[word] = word_hash(word)
        return found

    def of(self, found: list[str]) -> NDArray[np.uint32]:
        """Return the hash of each word."""
        return np.fromiter(map(self.__getitem__, found), np.uint32, len(found))


def ngram_hashes(symbols: NDArray[np.uint32], n: int) -> Hashes:
    """Return the 64-bit hash of each run of `n` symbols, in order: len(symbols) - n + 1 of them."""
    num_grams = max(len(symbols) - n + 1, 0)
    hashes = np.zeros(num_grams, np.uint64)
    for i in range(n):
        hashes *= MULTIPLIER
        hashes += symbols[i : i + num_grams]
    for _ in range(2):
        hashes ^= hashes >> HALF
        hashes *= _MIXER
    hashes ^= hashes >> HALF
    return hashes


def joined_ranges(starts: Indices, lengths: Indices) -> Indices:
    """Return start, start + 1, ... (length of them) of every range, one range after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def frequent(grams: Hashes, *, above: float) -> Hashes:
    """Return, ascending and once each, the grams that stand more than `above` times in the array."""
    ascending = np.sort(grams)
    starts = run_starts(ascending)
    return ascending[starts[np.diff(starts, append=len(grams)) > above]]


def distinct(values: NDArray[_Integer]) -> NDArray[_Integer]:
    """Return the distinct values, ascending, by sorting (numpy.unique hashes 64-bit integers, many times slower)."""
    ascending = np.sort(values)
    return ascending[run_starts(ascending)]


def run_starts(values: NDArray[np.generic]) -> Indices:
    """Return the index of each value that differs from the one before it, the first one's included."""
    changed = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return np.flatnonzero(changed)


def contained(values: NDArray[_Integer], ascending: NDArray[_Integer]) -> NDArray[np.bool_]:
    """Tell for each value whether it stands in the ascending array."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    return ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values


def batches(lengths: Indices, *, at_most: int) -> list[slice]:
    """Return slices of consecutive entries whose lengths sum to at most `at_most`, or that hold one entry alone."""
    ends = np.cumsum(lengths)
    slices, start = [], 0
    while start < len(lengths):
        before = ends[start] - lengths[start]
        stop = max(int(np.searchsorted(ends, before + at_most, side="right")), start + 1)
        slices.append(slice(start, stop))
        start = stop
    return slices
