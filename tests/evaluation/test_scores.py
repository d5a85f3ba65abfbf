from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from keeptune.errors import DataError
from keeptune.evaluation.metrics import LOSS_METRICS, METRICS, Answer
from keeptune.evaluation.scores import Paired, Score, paired_differences, score_answers


def answer(
    number: int,
    exact: float = 0.0,
    *,
    task: str = "t",
    cluster: str | None = None,
    loss: float = 1.0,
    tokens: int = 1,
    prediction: str = "",
    reference: str = "",
) -> Answer:
    metrics = {"exact_match": float(exact), "loss": loss, "perplexity": math.exp(loss), "bleu": 0.0}
    return Answer(f"id{number}", task, cluster or f"c{number}", "", prediction, (reference,), True, metrics, tokens)


def answers(values: list[float], clusters: list[str] | None = None) -> list[Answer]:
    return [answer(i, value, cluster=clusters[i] if clusters else None) for i, value in enumerate(values)]


def only(scores: list[Score], task: str = "all") -> Score:
    (score,) = [score for score in scores if score.task == task]
    return score


def interval(mine: list[float], theirs: list[float], *, clusters: list[str] | None = None) -> Paired:
    found = paired_differences(
        answers(mine, clusters), answers(theirs, clusters), metrics=["exact_match"], model="lora", against="base"
    )
    return next(paired for paired in found if paired.task == "all")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_with_singleton_clusters_the_error_is_the_naive_one(values: list[float]) -> None:
    score = only(score_answers(answers(values), metrics=["exact_match"]))
    assert score.mean == pytest.approx(np.mean(values), abs=1e-12)
    naive = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    assert score.standard_error == pytest.approx(naive, rel=1e-9, abs=1e-12)


def test_with_equal_clusters_the_error_is_that_of_their_means() -> None:
    # Four inputs asked three times each, always with the same result: four observations, not twelve.
    values, clusters = [1.0] * 6 + [0.0] * 6, [f"c{i // 3}" for i in range(12)]
    score = only(score_answers(answers(values, clusters), metrics=["exact_match"]))
    assert (score.num_records, score.num_clusters) == (12, 4)
    assert score.standard_error == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    naive = only(score_answers(answers(values), metrics=["exact_match"]))
    assert score.standard_error is not None
    assert naive.standard_error is not None
    assert score.standard_error > 1.6 * naive.standard_error


def test_the_clustered_error_is_the_spread_of_the_mean_over_repeated_data() -> None:
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        shared = rng.normal(size=25)
        clusters = [c for c in range(25) for _ in range(1 + c % 4)]
        values = [float(shared[c] + 0.3 * rng.normal()) for c in clusters]
        score = only(score_answers(answers(values, [str(c) for c in clusters]), metrics=["exact_match"]))
        assert score.standard_error is not None
        means.append(score.mean)
        errors.append(score.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)


def test_one_cluster_has_no_error_and_no_interval() -> None:
    assert only(score_answers(answers([1.0, 0.0], ["c", "c"]), metrics=["exact_match"])).standard_error is None
    paired = interval([1.0, 1.0], [0.0, 1.0], clusters=["c", "c"])
    assert (paired.difference, paired.low, paired.high) == (0.5, None, None)


def test_each_task_is_scored_and_all_of_them_together() -> None:
    mixed = [answer(0, 1, task="b"), answer(1, 0, task="a"), answer(2, 1, task="b"), answer(3, 1, task="a")]
    scores = score_answers(mixed, metrics=["exact_match", "loss"])
    assert [(s.task, s.metric, s.mean, s.num_records) for s in scores] == [
        ("b", "exact_match", 1.0, 2),
        ("b", "loss", 1.0, 2),
        ("a", "exact_match", 0.5, 2),
        ("a", "loss", 1.0, 2),
        ("all", "exact_match", 0.75, 4),
        ("all", "loss", 1.0, 4),
    ]
    assert score_answers([], metrics=["loss"]) == []


def test_tasks_that_were_not_trained_on_are_the_others_and_not_among_all() -> None:
    mixed = [answer(0, 1, task="b"), answer(1, 0, task="a"), answer(2, 1, task="c"), answer(3, 1, task="a")]
    against = [answer(0, 0, task="b"), answer(1, 0, task="a"), answer(2, 0, task="c"), answer(3, 1, task="a")]
    scores = score_answers(mixed, metrics=["exact_match"], untrained_tasks={"a", "c"})
    assert [(s.task, s.mean, s.num_records) for s in scores] == [
        ("b", 1.0, 1),
        ("a", 0.5, 2),
        ("c", 1.0, 1),
        ("all", 1.0, 1),
        ("others", pytest.approx(2 / 3), 3),
    ]
    found = paired_differences(
        mixed, against, metrics=["exact_match"], model="lora", against="base", untrained_tasks={"a", "c"}
    )
    assert [(p.task, p.difference) for p in found] == [
        ("b", 1.0),
        ("a", 0.0),
        ("c", 1.0),
        ("all", 1.0),
        ("others", pytest.approx(1 / 3)),
    ]
    assert [s.task for s in score_answers(mixed, metrics=["loss"], untrained_tasks={"a", "b", "c"})][-1] == "others"


def test_loss_is_weighted_by_tokens_and_its_error_by_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    losses, tokens = rng.gamma(4.0, 0.5, size=400), rng.integers(1, 60, size=400)
    rows = [answer(i, loss=float(losses[i]), tokens=int(tokens[i])) for i in range(400)]
    score = only(score_answers(rows, metrics=["loss"]))
    mean = float((losses * tokens).sum() / tokens.sum())
    assert score.mean == pytest.approx(mean)
    residuals = (losses - mean) * tokens / tokens.sum()
    assert score.standard_error == pytest.approx(math.sqrt(400 / 399 * np.square(residuals).sum()), rel=0.01)


def test_bleu_is_the_corpus_score_and_no_mean_of_sentences() -> None:
    predictions = ["the cat sat on the mat", "a dog", "it is raining very hard today in town"]
    references = ["the cat sat on a mat", "the dog ran", "it is raining hard today in the town"]
    rows = [answer(i, prediction=p, reference=references[i]) for i, p in enumerate(predictions)]
    score = only(score_answers(rows, metrics=["bleu"]))
    assert score.mean == pytest.approx(BLEU().corpus_score(predictions, [references]).score)
    assert score.standard_error is not None
    assert score.standard_error > 0


def test_a_paired_difference_counts_who_moved_and_in_which_direction_is_better() -> None:
    mine = [answer(0, 1, loss=1.0), answer(1, 1, loss=2.0), answer(2, 0, loss=3.0), answer(3, 1, loss=1.0)]
    theirs = [answer(0, 0, loss=2.0), answer(1, 0, loss=2.0), answer(2, 1, loss=1.0), answer(3, 1, loss=4.0)]
    found = paired_differences(mine, theirs, metrics=["exact_match", "loss"], model="lora", against="base")
    exact, loss = [paired for paired in found if paired.task == "all"]
    assert (exact.model, exact.against, exact.metric) == ("lora", "base", "exact_match")
    assert (exact.difference, exact.better, exact.worse) == (0.25, 2, 1)
    assert (loss.difference, loss.better, loss.worse) == (-0.5, 2, 1)
    assert [paired.task for paired in found] == ["t", "t", "all", "all"]


def test_pairing_sees_a_difference_that_two_separate_errors_would_hide() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.normal(size=200)
    mine = theirs + 0.05 + 0.05 * rng.normal(size=200)
    paired = interval([float(v) for v in mine], [float(v) for v in theirs])
    assert paired.low is not None
    assert paired.high is not None
    assert 0 < paired.low < paired.difference < paired.high
    assert paired.high - paired.low < 0.03


def test_of_many_records_an_interval_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(3)
    moved = [float(v) for v in rng.normal(0.3, 1.0, size=400)]
    first = interval(moved, [0.0] * 400)
    error = np.std(moved, ddof=1) / 20
    assert first.low == pytest.approx(first.difference - 1.96 * error, abs=0.005)
    assert first.high == pytest.approx(first.difference + 1.96 * error, abs=0.005)


def test_each_metric_has_the_interval_of_its_kind() -> None:
    mine = [answer(i, exact=float(i % 4 > 0), loss=1.0 + i % 3, tokens=1 + i % 5) for i in range(40)]
    exact, loss, perplexity = (only(score_answers(mine, metrics=[name])) for name in ("exact_match", *LOSS_METRICS))
    # Wilson's for 30 of 40.
    assert (exact.low, exact.high) == pytest.approx((0.5981, 0.8581), abs=5e-5)
    assert loss.low is not None and loss.high is not None
    assert loss.low * loss.high == pytest.approx(loss.mean**2)
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(loss.low), math.exp(loss.high)))
    paired = interval([1.0] * 3 + [0.0] * 17, [0.0] * 20)
    # Bonett and Price's: (4 - 1) / 22 ± 1.96 x ((5 / 22 - (3 / 22)^2) / 22)^(1/2).
    assert (paired.low, paired.high) == pytest.approx((3 / 22 - 0.19088, 3 / 22 + 0.19088), abs=5e-5)
    all_right = only(score_answers(answers([1.0] * 20), metrics=["exact_match"]))
    assert (all_right.low, all_right.high) == pytest.approx((0.8389, 1.0), abs=5e-5)


def test_of_records_that_were_picked_as_the_worst_the_interval_is_wider() -> None:
    mine, theirs = answers([1.0] * 3 + [0.5] * 17), answers([0.5] * 20)
    how = {"metrics": ["exact_match"], "model": "lora", "against": "base"}
    single, of_ten = (paired_differences(mine, theirs, **how, confidence=c)[0] for c in (0.95, 0.995))
    assert single.low is not None and of_ten.low is not None
    assert of_ten.low < single.low and of_ten.difference == single.difference


@pytest.mark.parametrize("clustered", [False, True])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(clustered: bool) -> None:
    rng = np.random.default_rng(4)
    covered, num_trials, num_records = 0, 150, 60
    names = [f"c{i // 3 if clustered else i}" for i in range(num_records)]
    for _ in range(num_trials):
        shared = {name: rng.normal() for name in names}
        theirs = rng.normal(size=num_records)
        moved = [0.4 + (shared[name] if clustered else 0.0) + rng.normal() for name in names]
        paired = interval([float(t + m) for t, m in zip(theirs, moved, strict=True)], theirs.tolist(), clusters=names)
        assert paired.low is not None
        assert paired.high is not None
        covered += paired.low <= 0.4 <= paired.high
    assert 0.88 <= covered / num_trials <= 0.99


def test_an_interval_that_left_clusters_out_would_be_too_narrow() -> None:
    rng = np.random.default_rng(5)
    shared = rng.normal(size=20)
    moved, names = [float(shared[i // 5]) for i in range(100)], [f"c{i // 5}" for i in range(100)]
    grouped, single = interval(moved, [0.0] * 100, clusters=names), interval(moved, [0.0] * 100)
    widths = [paired.high - paired.low for paired in (grouped, single) if paired.low is not None and paired.high]
    assert widths[0] > 1.8 * widths[1]


def test_answers_to_other_records_are_refused() -> None:
    with pytest.raises(DataError) as error:
        paired_differences(
            answers([1.0, 0.0]), answers([1.0, 0.0])[::-1], metrics=["exact_match"], model="lora", against="base"
        )
    assert str(error.value) == (
        "lora and base: found answers to different records (2 and 2); expected the same ones in the same order. "
        "Evaluate both again."
    )


def test_every_metric_has_scores_and_differences() -> None:
    # The others need packages or files that may not be here.
    names = [name for name in METRICS if not name.endswith(("mecab", "flores200"))]
    mine = [
        Answer(str(i), "t", str(i), "", "the cat sat on it", ("the cat sat on us",), True, dict.fromkeys(names, 0.5), 4)
        for i in range(6)
    ]
    assert len(score_answers(mine, metrics=names)) == 2 * len(names)
    for paired in paired_differences(mine, mine, metrics=names, model="a", against="b"):
        assert (paired.difference, paired.better, paired.worse) == (0.0, 0, 0)
        # Nothing bounds what the loss of other records may be; of all else the metric's bounds do.
        unbounded = paired.metric in (*LOSS_METRICS, "kl")
        assert (paired.low is None) == unbounded
        assert unbounded or (paired.low or 0.0) < 0.0 < (paired.high or 0.0)
