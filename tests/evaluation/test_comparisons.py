"""Every pair of several models: p-values as scipy gives them, corrected as Holm says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from keeptune.errors import DataError
from keeptune.evaluation.comparisons import Comparison, compare_models, holm, mcnemar
from keeptune.evaluation.metrics import Answer
from keeptune.evaluation.scores import paired_differences


def answers(
    values: list[float], *, clusters: list[str] | None = None, losses: list[float] | None = None
) -> list[Answer]:
    return [
        Answer(
            id=f"id{i}",
            task="t",
            cluster=clusters[i] if clusters else f"c{i}",
            prompt="",
            prediction="",
            references=("",),
            ended=True,
            metrics={"exact_match": value, "loss": losses[i] if losses else 1.0},
            num_target_tokens=1 + i % 3,
        )
        for i, value in enumerate(values)
    ]


def compared(*values: list[float], clusters: list[str] | None = None) -> list[Comparison]:
    models = {f"m{i}": answers(row, clusters=clusters) for i, row in enumerate(values)}
    found = compare_models(models, metrics=["exact_match"], main_metric="exact_match")
    return [comparison for comparison in found if comparison.paired.task == "all"]


@pytest.mark.parametrize("num_records", [2, 5, 40])
def test_with_singleton_clusters_the_p_value_is_that_of_the_paired_t_test(num_records: int) -> None:
    generator = np.random.default_rng(num_records)
    mine, theirs = generator.random(num_records), generator.random(num_records)
    (found,) = compared(theirs.tolist(), mine.tolist())
    assert found.paired.difference == pytest.approx(mine.mean() - theirs.mean(), abs=1e-12)
    assert found.p_value == pytest.approx(float(stats.ttest_rel(mine, theirs).pvalue), rel=1e-9)


def test_with_clusters_of_one_size_the_p_value_is_that_of_their_means() -> None:
    # Four inputs asked three times each, always with the same result: four observations, not twelve.
    values, clusters = [1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.75] * 3, [f"c{i // 3}" for i in range(12)]
    (found,) = compared([0.0] * 12, values, clusters=clusters)
    assert found.p_value == pytest.approx(float(stats.ttest_rel([1.0, 0.5, 0.25, 0.75], [0.0] * 4).pvalue), rel=1e-9)
    (naive,) = compared([0.0] * 12, values)
    assert naive.p_value is not None and found.p_value is not None
    assert naive.p_value < found.p_value / 10


def test_the_p_value_is_uniform_where_two_models_are_equally_good() -> None:
    generator = np.random.default_rng(0)
    p_values = [
        compared(
            generator.random(12).tolist(), generator.random(12).tolist(), clusters=[f"c{i // 2}" for i in range(12)]
        )
        for _ in range(60)
    ]
    assert stats.kstest([found.p_value for (found,) in p_values], "uniform").pvalue > 0.01


def test_identical_models_differ_by_exactly_nothing() -> None:
    models = {name: answers([1.0, 0.0, 1.0], losses=[0.1, 2.7, 1.3]) for name in ("a", "b")}
    for found in compare_models(models, metrics=["exact_match", "loss"], main_metric="exact_match"):
        paired = found.paired
        assert (paired.difference, paired.standard_error) == (0.0, 0.0)
        # Bonett and Price's: 1.96 x 2^(1/2) / 5; of a loss that no record moved, nothing can be said.
        ends = (-0.55436, 0.55436) if paired.metric == "exact_match" else (None, None)
        assert (paired.low, paired.high) == pytest.approx(ends, abs=1e-5)
        assert (paired.better, paired.worse, found.p_value) == (0, 0, 1.0)
        assert found.holm_p_value in (1.0, None)
        assert found.mcnemar_p_value == (1.0 if paired.metric == "exact_match" else None)


def test_where_all_records_move_alike_their_number_alone_decides() -> None:
    # Every one of n differences has the same sign: two of the 2^n ways to give them signs are as extreme.
    (found,) = compared([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert found.p_value == 0.25
    # A tenth is no binary fraction: its spread is rounding, which must not pass for one.
    (found,) = compared([0.1 * i for i in range(8)], [0.1 * i + 0.1 for i in range(8)])
    assert found.p_value == 2.0**-7


def test_one_cluster_has_no_p_value_and_does_not_count_in_the_family() -> None:
    (found,) = compared([0.0, 1.0], [1.0, 1.0], clusters=["c", "c"])
    assert (found.p_value, found.holm_p_value, found.mcnemar_p_value) == (None, None, None)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_step_down_of_five_lines(seed: int) -> None:
    p_values = (np.random.default_rng(seed).random(7) ** 3).tolist()
    expected, largest = [0.0] * 7, 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, (7 - rank) * p_values[i])
        expected[i] = min(1.0, largest)
    assert holm(p_values) == pytest.approx(expected, rel=1e-12)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1: 0.03, 0.04, 0.04; in the order in which they came.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    # Twice 0.03 is more than once 0.04, and a larger p-value gets no smaller corrected one.
    assert holm([0.03, 0.04]) == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02, None, 0.03]) == [0.04, None, 0.04]
    assert holm([]) == []


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 9), (9, 3), (5, 5), (0, 24), (12, 12)])
def test_mcnemar_below_twenty_five_changed_records_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(0, 25), (10, 15), (15, 10), (20, 20), (30, 51)])
def test_mcnemar_from_twenty_five_on_counts_half_of_what_is_as_extreme(lost: int, gained: int) -> None:
    changed, fewer = lost + gained, min(lost, gained)
    chances = [math.comb(changed, k) / 2**changed for k in range(changed + 1)]
    expected = 2 * (sum(chances[:fewer]) + chances[fewer] / 2)
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) <= stats.binomtest(lost, changed).pvalue


def test_mcnemar_counts_the_records_that_changed_and_stands_for_right_and_wrong_alone() -> None:
    mine, theirs = [1.0] * 9 + [0.0] * 3 + [1.0] * 8, [0.0] * 9 + [1.0] * 3 + [1.0] * 8
    (found,) = compared(theirs, mine)
    assert (found.paired.better, found.paired.worse) == (9, 3)
    assert found.mcnemar_p_value == pytest.approx(stats.binomtest(3, 12).pvalue)
    (half_right,) = compared([0.5, *theirs[1:]], mine)
    assert half_right.mcnemar_p_value is None
    (clustered,) = compared(theirs, mine, clusters=[f"c{i // 2}" for i in range(20)])
    assert clustered.mcnemar_p_value is None


def test_the_family_is_every_pair_in_the_main_metric_over_all_tasks() -> None:
    generator = np.random.default_rng(3)
    rows = {name: generator.random(30).tolist() for name in ("a", "b", "c")}
    models = {name: answers(row, losses=generator.random(30).tolist()) for name, row in rows.items()}
    found = compare_models(models, metrics=["exact_match", "loss"], main_metric="exact_match")
    family = [c for c in found if c.holm_p_value is not None]
    assert [(c.paired.model, c.paired.against) for c in family] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert {(c.paired.task, c.paired.metric) for c in family} == {("all", "exact_match")}
    alone = [float(stats.ttest_rel(rows[c.paired.model], rows[c.paired.against]).pvalue) for c in family]
    assert [c.holm_p_value for c in family] == pytest.approx(holm(alone), rel=1e-9)
    # Three pairs, two metrics, one task and all of them together.
    assert len(found) == 3 * 2 * 2 and all(c.p_value is not None for c in found)


def test_a_calling_of_clear_differences_among_equal_models_is_rarely_wrong() -> None:
    generator = np.random.default_rng(7)
    p_values = generator.random((2000, 6))
    wrong = [any(p is not None and p < 0.05 for p in holm(row.tolist())) for row in p_values]
    assert 0.03 < np.mean(wrong) < 0.07
    assert np.mean((p_values < 0.05).any(axis=1)) > 0.2


def test_losses_over_other_tokens_are_compared_with_no_other_models() -> None:
    models = {name: answers([1.0, 0.0], losses=[1.0, 2.0]) for name in ("a", "b", "own")}
    found = compare_models(models, metrics=["exact_match", "loss"], main_metric="exact_match", without_loss={"own"})
    pairs = {(c.paired.model, c.paired.against) for c in found if c.paired.metric == "loss"}
    assert pairs == {("b", "a")}
    assert len({(c.paired.model, c.paired.against) for c in found if c.paired.metric == "exact_match"}) == 3


def test_answers_to_other_records_are_refused() -> None:
    with pytest.raises(DataError, match="found answers to different records"):
        compare_models({"a": answers([1.0]), "b": answers([1.0, 0.0])}, metrics=["loss"], main_metric="loss")


def test_the_error_of_a_difference_is_that_of_the_difference_of_two_ratios() -> None:
    # Loss is a ratio of sums. Leaving each record out by hand gives the jackknife.
    mine, theirs = [0.5, 1.0, 4.0, 2.0, 1.5], [1.0, 0.2, 3.0, 2.5, 1.0]
    (paired,) = [
        p
        for p in paired_differences(
            answers([0.0] * 5, losses=mine),
            answers([0.0] * 5, losses=theirs),
            metrics=["loss"],
            model="m",
            against="a",
        )
        if p.task == "all"
    ]
    weights = np.array([1, 2, 3, 1, 2])
    left_out = []
    for i in range(5):
        kept = np.arange(5) != i
        left_out.append(np.average(np.array(mine) - theirs, weights=weights * kept))
    expected = math.sqrt(4 / 5 * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert paired.standard_error == pytest.approx(expected, rel=1e-12)
    assert (paired.num_records, paired.num_clusters) == (5, 5)
