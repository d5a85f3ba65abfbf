"""BM25 against the formula, term by term."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.data.bm25 import Bm25

TEXTS = ["red red blue", "blue green", "green", "a long text of red and of blue and of nothing else"]
WORDS = st.lists(st.sampled_from("abcdef"), max_size=12).map(" ".join)


def by_hand(texts: list[str], query: str) -> list[float]:
    bags, scores = [Counter(text.split()) for text in texts], []
    mean = max(1.0, sum(bag.total() for bag in bags) / len(bags))
    for bag in bags:
        score = 0.0
        for word in query.split():
            holders = sum(word in other for other in bags)
            rarity = math.log(1 + (len(bags) - holders + 0.5) / (holders + 0.5))
            score += rarity * bag[word] * 2.2 / (bag[word] + 1.2 * (0.25 + 0.75 * bag.total() / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["red", "blue green", "red red blue unknown", "", "of"])
def test_the_scores_are_those_of_the_formula(query: str) -> None:
    assert Bm25(TEXTS).scores(query).tolist() == pytest.approx(by_hand(TEXTS, query))


@settings(max_examples=50, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8), WORDS)
def test_the_scores_of_any_texts_are_those_of_the_formula(texts: list[str], query: str) -> None:
    assert Bm25(texts).scores(query).tolist() == pytest.approx(by_hand(texts, query))


def test_case_punctuation_and_white_space_do_not_count() -> None:
    assert (
        Bm25(["Red, BLUE!\n", "green"]).scores("blue  red?").tolist()
        == Bm25(["red blue", "green"]).scores("red blue").tolist()
    )
