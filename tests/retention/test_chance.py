"""Which suites the base has something to lose on, judged in the metric that they have a budget in."""

from __future__ import annotations

import random

import pytest

from keeptune.evaluation.metrics import Answer, measure
from keeptune.retention.chance import Chance, chance_of

COLOURS = ["red", "blue", "green", "gold", "black", "white"]


def answered(pairs: list[tuple[str, str]], *, cluster: str | None = None) -> list[Answer]:
    """Return answers of (prediction, reference), scored as evaluation scores them."""
    names = ("exact_match", "rougeL", "rouge2", "bleu", "chrf", "loss")
    return [
        Answer(f"id{i}", "t", cluster or f"c{i}", "", p, (r,), True, measure(p, [r], loss=1.0, names=names), 3)
        for i, (p, r) in enumerate(pairs)
    ]


def test_a_base_that_is_always_right_is_above_chance_in_the_metric_that_sees_it() -> None:
    """One word has no pair of words: ROUGE-2 is 0 for the right answer. So is ROUGE-L for one in Chinese."""
    right = answered([(COLOURS[i % 6], COLOURS[i % 6]) for i in range(100)])
    assert chance_of(right, metric="exact_match") == Chance(1.0, 0.17, above=True, clearly=True)
    assert not chance_of(right, metric="rouge2").above
    chinese = answered([("红色", "红色"), ("蓝色", "蓝色"), ("绿色", "绿色")] * 30)
    assert chance_of(chinese, metric="exact_match").above and chance_of(chinese, metric="chrf").above
    assert not chance_of(chinese, metric="rougeL").above


@pytest.mark.parametrize("metric", ["exact_match", "rougeL", "bleu", "chrf"])
def test_a_base_that_is_never_right_is_at_chance(metric: str) -> None:
    assert not chance_of(answered([("?", f"a sentence of number {i}") for i in range(50)]), metric=metric).above


def test_few_right_answers_to_free_questions_can_be_lost() -> None:
    """36 of 400 were once left out, since they are less than a tenth of the scale; so was a BLEU of 3."""
    pairs = [(f"sentence {i}" if i < 36 else "?", f"sentence {i}") for i in range(400)]
    assert chance_of(answered(pairs), metric="exact_match") == Chance(0.09, 0.0, above=True, clearly=False)
    phrase = "the cat sat on the mat and then it slept"
    bleu = chance_of(answered([(phrase if i < 4 else "no", f"{phrase} {i}") for i in range(100)]), metric="bleu")
    assert 0.0 < bleu.base < 10.0 and bleu.above


def test_guessing_among_two_labels_is_told_from_knowing_by_the_number_of_records() -> None:
    generator = random.Random(0)

    def base(number: int, *, right: float) -> list[Answer]:
        labels = [generator.choice(("yes", "no")) for _ in range(number)]
        wrong = {"yes": "no", "no": "yes"}
        return answered([(label if generator.random() < right else wrong[label], label) for label in labels])

    assert not chance_of(base(400, right=0.5), metric="exact_match").above
    small = chance_of(base(2000, right=0.57), metric="exact_match")
    assert small.above and not small.clearly
    # At the level of a certificate: what is told at one is not told at a stricter one.
    told = base(400, right=0.61)
    assert chance_of(told, metric="exact_match", level=0.05).above
    assert not chance_of(told, metric="exact_match", level=0.0001).above


def test_always_naming_one_label_is_chance() -> None:
    pairs = [("no", "no" if i % 10 else "yes") for i in range(200)]
    assert chance_of(answered(pairs), metric="exact_match") == Chance(0.9, 0.9, above=False, clearly=False)
    assert not chance_of(answered(pairs), metric="chrf").above


def test_one_reference_for_all_is_no_choice_among_labels() -> None:
    found = chance_of(answered([("4", "4")] * 30), metric="exact_match")
    assert found == Chance(1.0, 0.0, above=True, clearly=True)


def test_a_high_score_over_very_few_records_is_above_chance() -> None:
    for number in (1, 2, 3):
        right = answered([(COLOURS[i], COLOURS[i]) for i in range(number)])
        assert chance_of(right, metric="exact_match").above


def test_records_of_one_input_allow_no_test_and_keep_their_suite() -> None:
    assert chance_of(answered([("no", "no"), ("no", "yes")] * 20, cluster="c"), metric="exact_match").above


def test_a_guess_by_lot_counts_where_it_is_more_than_the_most_frequent_label() -> None:
    pairs = [("a" if i % 4 == 0 else "?", "abcde"[i % 5]) for i in range(200)]
    metrics = [{"acc": float(p == r or i % 4 == 1)} for i, (p, r) in enumerate(pairs)]
    base = [
        Answer(f"id{i}", "t", f"c{i}", "", p, (r,), True, m, 1)
        for i, ((p, r), m) in enumerate(zip(pairs, metrics, strict=True))
    ]
    assert chance_of(base, metric="acc").above
    guessed = chance_of(base, metric="acc", least=0.3)
    assert (guessed.level, guessed.above) == (pytest.approx(0.3), False)


def test_a_loss_has_no_chance_level() -> None:
    assert chance_of(answered([("?", "right")]), metric="loss") == Chance(1.0, 0.0, above=True, clearly=False)
