"""MCC and F1 as functions of sums: the values of sklearn, and errors and differences as of every metric."""

from __future__ import annotations

import numpy as np
import pytest

from keeptune.evaluation.labels import ANSWERED, GOLD
from keeptune.evaluation.metrics import Answer
from keeptune.evaluation.scores import paired_differences, score_answers
from keeptune.retention.chance import chance_of
from keeptune.retention.measures import measure_retention

NAMES = ("mcc", "binary_f1")


def answered(gold: list[int], labels: list[int]) -> list[Answer]:
    return [
        Answer(
            f"id{i}", "cola", f"c{i}", "", str(p), (str(g),), True,
            {GOLD: float(g), ANSWERED: float(p), **dict.fromkeys(NAMES, float(g == p))}, 0,
        )
        for i, (g, p) in enumerate(zip(gold, labels, strict=True))
    ]  # fmt: skip


def value(answers: list[Answer], metric: str) -> float:
    return score_answers(answers, metrics=[metric])[0].mean


@pytest.mark.parametrize("seed", range(5))
def test_mcc_and_f1_are_those_of_sklearn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    for num_labels in (2, 3, 7):
        gold, labels = rng.integers(num_labels, size=(2, 150))
        labels = np.where(rng.random(150) < 0.5, gold, labels)
        found = answered(gold.tolist(), labels.tolist())
        assert value(found, "mcc") == pytest.approx(sklearn.matthews_corrcoef(gold, labels), abs=1e-9)
        if num_labels == 2:
            assert value(found, "binary_f1") == pytest.approx(sklearn.f1_score(gold, labels), abs=1e-9)


def test_a_model_that_always_gives_one_label_has_no_correlation() -> None:
    one = answered([0, 1] * 20, [1] * 40)
    assert value(one, "mcc") == 0.0 and value(one, "binary_f1") == pytest.approx(2 / 3)
    assert value(answered([0] * 10, [0] * 10), "binary_f1") == 0.0


def test_the_error_is_that_of_leaving_each_document_out() -> None:
    rng = np.random.default_rng(0)
    gold, labels = (rng.integers(2, size=40).tolist() for _ in range(2))
    found = answered(gold, labels)
    for metric in NAMES:
        left_out = np.array([value(found[:i] + found[i + 1 :], metric) for i in range(40)])
        expected = np.sqrt(39 / 40 * np.square(left_out - left_out.mean()).sum())
        assert score_answers(found, metrics=[metric])[0].standard_error == pytest.approx(expected)


def test_what_a_task_forgot_is_the_difference_of_its_own_metric() -> None:
    gold = [0, 1] * 50
    before, after = answered(gold, gold), answered(gold, [g if i < 60 else 1 for i, g in enumerate(gold)])
    for metric in NAMES:
        (found,) = measure_retention(before, after, metric=metric).tasks
        assert (found.base, found.tuned) == (1.0, pytest.approx(value(after, metric)))
        assert found.forgetting == pytest.approx(1.0 - value(after, metric))
        assert (found.num_lost, found.num_gained) == (20, 0)
        assert found.low is not None and found.high is not None
        assert found.low < found.forgetting < found.high
        pair = paired_differences(after, before, metrics=[metric], model="a", against="b")[0]
        assert (pair.difference, pair.standard_error) == pytest.approx((-found.forgetting, found.standard_error))


def test_chance_is_a_correlation_of_0_and_the_f1_of_always_finding_it() -> None:
    gold = [0, 1, 1] * 60
    always = answered(gold, [1] * 180)
    assert (chance_of(always, metric="mcc").level, chance_of(always, metric="mcc").above) == (0.0, False)
    f1 = chance_of(always, metric="binary_f1")
    assert f1.level == pytest.approx(0.8) and not f1.above
    assert all(chance_of(answered(gold, gold), metric=metric).above for metric in NAMES)
