from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keeptune.errors import DataError
from keeptune.evaluation.metrics import METRICS, Answer
from keeptune.retention.drops import largest_inputs, metric_scale, paired_drops


def answer(number: int, *, cluster: str = "", **metrics: float) -> Answer:
    return Answer(f"id{number}", "sst2", cluster or f"c{number}", "", "", ("",), True, metrics, 1)


def test_what_falls_is_positive_and_counted_as_lost() -> None:
    base = [answer(i, exact_match=value) for i, value in enumerate([1.0, 1.0, 0.0, 0.0])]
    tuned = [answer(i, exact_match=value) for i, value in enumerate([0.0, 1.0, 1.0, 0.0])]
    drops = paired_drops(base, tuned, metric="exact_match", scale=1.0, suite="sst2")
    assert drops.values_R.tolist() == [1.0, 0.0, -1.0, 0.0]
    assert (drops.num_records, drops.num_changed, drops.num_lost, drops.num_gained) == (4, 2, 1, 1)


def test_a_loss_that_rises_is_lost_too() -> None:
    base, tuned = [answer(0, loss=1.0), answer(1, loss=2.0)], [answer(0, loss=1.25), answer(1, loss=1.5)]
    drops = paired_drops(base, tuned, metric="loss", scale=1.0, suite="text")
    assert drops.values_R.tolist() == [0.25, -0.5]


def test_what_a_record_loses_beyond_the_scale_counts_as_the_scale() -> None:
    base, tuned = [answer(0, loss=1.0), answer(1, loss=9.0)], [answer(0, loss=8.0), answer(1, loss=1.0)]
    drops = paired_drops(base, tuned, metric="loss", scale=1.5, suite="text")
    assert (drops.values_R.tolist(), drops.scale) == ([1.5, -1.5], 1.5)


def test_a_score_of_another_scale_is_refused() -> None:
    base, tuned = [answer(0, exact_match=23.0)], [answer(0, exact_match=4.0)]
    with pytest.raises(DataError, match=r"sst2: found exact_match that changes by 19; expected at most 1, as points"):
        paired_drops(base, tuned, metric="exact_match", scale=1.0, suite="sst2")


def test_records_of_one_task_are_of_one_kind() -> None:
    base = [replace(answer(i, loss=1.0), task=task) for i, task in enumerate(["b", "a", "b"])]
    drops = paired_drops(base, base, metric="loss", scale=1.0, suite="others")
    assert drops.strata_R is not None and drops.strata_R.tolist() == [1, 0, 1]


def test_nothing_lost_is_no_negative_zero() -> None:
    base = [answer(0, loss=1.0)]
    assert str(paired_drops(base, base, metric="loss", scale=1.0, suite="text").values_R[0]) == "0.0"


def test_records_of_one_input_share_a_number_and_their_order_decides_nothing() -> None:
    base = [answer(i, cluster=cluster, loss=1.0) for i, cluster in enumerate(["b", "a", "b", "c"])]
    assert paired_drops(base, base, metric="loss", scale=1.0, suite="text").clusters_R.tolist() == [1, 0, 1, 2]
    assert paired_drops(base[::-1], base[::-1], metric="loss", scale=1.0, suite="text").clusters_R.tolist() == [
        2,
        1,
        0,
        1,
    ]


def test_bleu_and_chrf_have_a_scale_of_a_hundred_and_all_else_one_of_one() -> None:
    large = {name for name in METRICS if metric_scale(name) == 100.0}
    assert large == {"chrf", *(name for name in METRICS if name.startswith("bleu"))}
    assert {metric_scale(name) for name in METRICS} == {1.0, 100.0}
    base, tuned = [answer(0, chrf=60.0)], [answer(0, chrf=35.0)]
    drops = paired_drops(base, tuned, metric="chrf", scale=100.0, suite="de")
    assert (drops.values_R.tolist(), drops.scale) == ([25.0], 100.0)
    assert drops.values_R.dtype == np.float64


def test_answers_to_other_records_are_refused() -> None:
    one, two = answer(1, loss=1.0), answer(2, loss=1.0)
    with pytest.raises(DataError) as error:
        paired_drops([one, two], [two, one], metric="loss", scale=1.0, suite="sst2")
    assert str(error.value) == (
        "sst2: found answers of the base and of the tuned model to different records (2 and 2); expected the same "
        "ones in the same order. Evaluate both again."
    )


def test_a_suite_without_a_record_is_refused() -> None:
    with pytest.raises(DataError) as error:
        paired_drops([], [], metric="loss", scale=1.0, suite="sst2")
    assert str(error.value) == (
        "sst2: found no record; expected some to measure forgetting on. Give the suite more records."
    )


@pytest.mark.parametrize(
    "metrics", [{"exact_match": float("nan")}, {"exact_match": float("inf")}, {"loss": 1.0}], ids=["nan", "inf", "none"]
)
def test_a_record_without_a_finite_value_is_refused(metrics: dict[str, Any]) -> None:
    base = [answer(i, exact_match=1.0) for i in range(3)]
    tuned = [answer(0, exact_match=1.0), replace(answer(1), metrics=metrics), answer(2, exact_match=1.0)]
    for one, other in ((base, tuned), (tuned, base)):
        with pytest.raises(DataError) as error:
            paired_drops(one, other, metric="exact_match", scale=1.0, suite="sst2")
        assert str(error.value) == (
            "sst2: found 1 of 3 records without a finite exact_match of base or tuned model, the first of them id1; "
            "expected one of each. Evaluate both again."
        )


def test_the_largest_input_of_a_task_is_counted_and_handed_on() -> None:
    reported = [answer(i, cluster="same" if i < 3 else "", exact_match=1.0) for i in range(6)]
    assert largest_inputs(reported) == {"sst2": 3}
    asked = [answer(9, exact_match=1.0)]
    drops = paired_drops(asked, asked, metric="exact_match", scale=1.0, suite="s", largest=largest_inputs(reported))
    assert drops.largest_R is not None and drops.largest_R.tolist() == [3]
