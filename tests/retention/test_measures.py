from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from keeptune.errors import DataError
from keeptune.evaluation.metrics import METRICS, Answer
from keeptune.evaluation.scores import paired_differences
from keeptune.retention.measures import TaskRetention, measure_retention


def answer(
    number: int,
    value: float,
    *,
    metric: str = "exact_match",
    task: str = "t",
    cluster: str | None = None,
    reference: str | None = None,
    tokens: int = 1,
) -> Answer:
    metrics = {metric: value, "loss": value}
    references = (f"reference {number}" if reference is None else reference,)
    return Answer(f"id{number}", task, cluster or f"c{number}", "", "", references, True, metrics, tokens)


def only(base: list[Answer], tuned: list[Answer], metric: str = "exact_match") -> TaskRetention:
    (task,) = measure_retention(base, tuned, metric=metric).tasks
    return task


def test_lost_and_gained_records_are_counted_beside_their_mean() -> None:
    base = [answer(i, float(i < 60)) for i in range(100)]
    tuned = [answer(i, float(10 <= i < 65)) for i in range(100)]
    found = only(base, tuned)
    assert (found.num_lost, found.num_gained, found.num_records, found.num_clusters) == (10, 5, 100, 100)
    assert (found.base, found.tuned, found.forgetting) == (0.6, 0.55, pytest.approx(0.05))
    moved = np.array([b.metrics["exact_match"] - t.metrics["exact_match"] for b, t in zip(base, tuned, strict=True)])
    assert found.standard_error == pytest.approx(stats.sem(moved))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.forgetting < found.high
    assert found.low == pytest.approx(0.05 - 1.96 * stats.sem(moved), abs=0.02)


def test_the_interval_is_the_paired_differences_turned_round() -> None:
    rng = np.random.default_rng(0)
    base = [answer(i, float(v), cluster=f"c{i // 2}") for i, v in enumerate(rng.random(60))]
    tuned = [answer(i, float(v), cluster=f"c{i // 2}") for i, v in enumerate(rng.random(60))]
    paired = paired_differences(tuned, base, metrics=["exact_match"], model="tuned", against="base")[0]
    found = only(base, tuned)
    assert paired.low is not None
    assert paired.high is not None
    assert (found.forgetting, found.low, found.high) == (-paired.difference, -paired.high, -paired.low)


def test_of_a_loss_a_rise_is_forgetting_and_tokens_are_its_weights() -> None:
    rng = np.random.default_rng(1)
    tokens = [int(n) for n in rng.integers(1, 50, size=80)]
    before, after = rng.random(80), rng.random(80) + 0.2
    base = [answer(i, float(before[i]), metric="loss", tokens=tokens[i]) for i in range(80)]
    tuned = [answer(i, float(after[i]), metric="loss", tokens=tokens[i]) for i in range(80)]
    found = only(base, tuned, "loss")
    assert found.forgetting == pytest.approx(np.average(after - before, weights=tokens))
    assert found.forgetting == pytest.approx(found.tuned - found.base)
    assert (found.num_lost, found.num_gained) == (np.sum(after > before), np.sum(after < before))
    assert found.low is not None
    assert found.high is not None
    assert found.standard_error is not None
    assert found.high - found.low == pytest.approx(2 * 1.99 * found.standard_error, rel=0.2)
    assert (found.chance, found.base_at_chance, found.retention) == (0.0, False, None)


def test_nothing_lost_is_exactly_nothing() -> None:
    # The others need packages or files that may not be here.
    for metric in (name for name in METRICS if not name.endswith(("mecab", "flores200"))):
        rows = [answer(i, 0.5, metric=metric) for i in range(40)]
        found = only(rows, rows, metric)
        assert (str(found.forgetting), found.standard_error) == ("0.0", 0.0)
        # Other records may change; of a loss, nothing bounds by how much.
        bounded = METRICS[metric].higher_is_better
        assert (found.low or 0.0) < 0.0 < (found.high or 0.0) if bounded else found.low is None
        assert found.retention == (1.0 if METRICS[metric].higher_is_better and METRICS[metric].scale == 1.0 else None)


def test_the_worst_of_several_has_the_wider_interval_that_holds_for_whichever_is_picked() -> None:
    base = [answer(i, 1.0, task=task) for task in "abc" for i in range(20)]
    tuned = [answer(i, float(task != "b" or i < 15), task=task) for task in "abc" for i in range(20)]
    worst = measure_retention(base, tuned, metric="exact_match").worst
    picked = paired_differences(tuned, base, metrics=["exact_match"], model="t", against="b", confidence=1 - 0.05 / 3)[
        1
    ]
    assert (worst.task, worst.num_suites) == ("b", 3)
    assert (worst.worst_low, worst.worst_high) == pytest.approx((-(picked.high or 0.0), -(picked.low or 0.0)))
    assert worst.worst_low is not None and worst.low is not None and worst.worst_low < worst.low
    assert measure_retention(base, tuned, metric="exact_match", num_suites=9).worst.num_suites == 9


def test_retention_is_the_share_of_what_was_above_chance() -> None:
    labels = ["yes"] * 50 + ["no"] * 30 + ["maybe"] * 20
    base = [answer(i, float(i < 90), reference=label) for i, label in enumerate(labels)]
    tuned = [answer(i, float(i < 70), reference=label) for i, label in enumerate(labels)]
    found = only(base, tuned)
    assert (found.chance, found.base_at_chance) == (0.5, False)
    assert found.retention == pytest.approx((0.7 - 0.5) / (0.9 - 0.5))


def test_a_base_at_chance_has_no_share_to_keep() -> None:
    # Right and wrong answers alternate with the labels' own rhythm of four: the base knows nothing of them.
    base = [answer(i, float(i % 2), reference="yes" if i % 4 < 2 else "no") for i in range(100)]
    found = only(base, base)
    assert (found.chance, found.base_at_chance, found.retention) == (0.5, True, None)
    above = [answer(i, float(i % 2 or i < 22), reference="yes" if i % 4 < 2 else "no") for i in range(100)]
    assert only(above, above).retention == 1.0
    free = [answer(i, float(i < 9)) for i in range(100)]
    assert (only(free, free).base_at_chance, only(free, free).retention) == (False, None)


def test_the_worst_task_stands_beside_the_mean_that_hides_it() -> None:
    base = [answer(i, 1.0, task=task) for task in "abc" for i in range(20)]
    tuned = [answer(i, float(task != "b" or i < 5), task=task) for task in "abc" for i in range(20)]
    found = measure_retention(base, tuned, metric="exact_match")
    assert [task.task for task in found.tasks] == ["a", "b", "c"]
    assert found.mean_forgetting == pytest.approx(0.25)
    assert (found.worst.task, found.worst.forgetting) == ("b", 0.75)
    equal = measure_retention(base, base, metric="exact_match")
    assert equal.worst.task == "a"


def test_one_cluster_has_no_error_and_no_interval() -> None:
    rows = [answer(i, 1.0, cluster="c") for i in range(3)]
    found = only(rows, rows)
    assert (found.forgetting, found.standard_error, found.low, found.high) == (0.0, None, None, None)


def test_answers_to_other_records_are_refused() -> None:
    with pytest.raises(DataError) as error:
        measure_retention([answer(0, 1.0)], [answer(0, 1.0, task="u")], metric="exact_match")
    assert str(error.value) == (
        "retention: found answers of the base and of the tuned model to different records (1 and 1); expected the "
        "same ones in the same order. Evaluate both again."
    )


def test_chance_is_at_least_what_is_known_of_the_task() -> None:
    base = [answer(i, float(i % 2), metric="acc") for i in range(40)]
    (found,) = measure_retention(base, base, metric="acc", least_chance=0.25).tasks
    assert found.chance == 0.25 and found.base == 0.5 and found.retention == 1.0
    (found,) = measure_retention(base, base, metric="acc", least_chance=0.45).tasks
    assert found.base_at_chance and found.chance == pytest.approx(0.45)
