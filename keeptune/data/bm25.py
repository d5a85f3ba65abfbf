"""Texts arrive; how well each matches a query leaves: BM25 over words. Shape key: D texts.

Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", section 3; the inverse
document frequency is Lucene's, which is never negative.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keeptune.data.ngrams import normalised, words

K1, B = 1.2, 0.75


class Bm25:
    """An index of texts by their words; case, punctuation and the form of white space do not count."""

    def __init__(self, texts: Sequence[str]) -> None:
        bags = [Counter(words(normalised(text))) for text in texts]
        lengths_D = np.array([bag.total() for bag in bags], dtype=np.float64)
        norms_D = K1 * (1 - B + B * lengths_D / max(1.0, lengths_D.mean()))
        holders: defaultdict[str, list[int]] = defaultdict(list)
        for i, bag in enumerate(bags):
            for word in bag:
                holders[word].append(i)
        self._num_texts = len(bags)
        self._weights: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for word, indices in holders.items():
            held = np.array(indices, dtype=np.int64)
            counts = np.array([bags[i][word] for i in indices], dtype=np.float64)
            rarity = math.log1p((len(bags) - len(held) + 0.5) / (len(held) + 0.5))
            self._weights[word] = held, rarity * counts * (K1 + 1) / (counts + norms_D[held])

    def scores(self, query: str) -> NDArray[np.float64]:
        """Return the score (D,) of each text; a word that the query holds twice counts twice."""
        scores_D = np.zeros(self._num_texts)
        for word, times in Counter(words(normalised(query))).items():
            if word in self._weights:
                held, weights = self._weights[word]
                scores_D[held] += times * weights
        return scores_D
