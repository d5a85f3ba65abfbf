from __future__ import annotations

import math

from keeptune.training.selection import Selection, describe_ties
from keeptune.training.settings import Validation


def validations(*values: tuple[float, float | None]) -> tuple[Validation, ...]:
    return tuple(Validation(i + 1, float(i + 1), loss, metric) for i, (loss, metric) in enumerate(values))


BY_LOSS = Selection("loss", False, 2)
BY_METRIC = Selection("rougeL", True, 2)


def test_the_lowest_loss_is_best_and_the_first_of_equals() -> None:
    best = BY_LOSS.best(validations((3.0, None), (2.0, None), (2.0, None), (2.5, None)))
    assert best is not None and best.step == 2


def test_the_metric_chooses_in_its_own_direction() -> None:
    taken = validations((1.0, 0.2), (9.0, 0.7), (0.5, None))
    best = BY_METRIC.best(taken)
    assert best is not None and best.step == 2
    lowest = Selection("perplexity", False, None).best(taken)
    assert lowest is not None and lowest.step == 1


def test_a_value_that_is_not_finite_is_never_best() -> None:
    best = BY_LOSS.best(validations((math.nan, None), (3.0, None), (-math.inf, None), (math.nan, None)))
    assert best is not None and best.step == 2
    assert BY_LOSS.best(validations((math.nan, None))) is None
    assert BY_LOSS.best(()) is None


def test_patience_ends_after_two_values_without_a_better_one() -> None:
    assert not BY_LOSS.out_of_patience(validations((2.0, None), (2.5, None)))
    assert BY_LOSS.out_of_patience(validations((2.0, None), (2.5, None), (2.0, None)))
    assert not BY_LOSS.out_of_patience(validations((2.0, None), (2.5, None), (1.9, None)))


def test_patience_counts_only_the_values_that_choose() -> None:
    assert not BY_METRIC.out_of_patience(validations((1.0, 0.5), (2.0, None), (3.0, None), (4.0, 0.4), (5.0, None)))
    assert BY_METRIC.out_of_patience(validations((1.0, 0.5), (2.0, 0.4), (3.0, None), (4.0, 0.5)))


def test_values_that_are_not_finite_use_patience_up() -> None:
    assert BY_LOSS.out_of_patience(validations((2.0, None), (math.nan, None), (math.nan, None)))
    assert BY_LOSS.out_of_patience(validations((math.nan, None), (math.nan, None)))


def test_without_patience_a_run_is_never_stopped_early() -> None:
    endless = Selection("loss", False, None)
    assert not endless.out_of_patience(validations((1.0, None), *[(2.0, None)] * 50))
    assert not BY_LOSS.out_of_patience(())


def test_of_equal_metrics_the_lowest_validation_loss_is_best() -> None:
    taken = validations((3.0, 0.0), (2.0, None), (2.5, 0.0), (2.5, 0.0), (2.7, 0.0))
    best = BY_METRIC.best(taken)
    assert best is not None and best.step == 3
    assert BY_METRIC.ties(taken) == [taken[0], *taken[2:]]
    lower_is_better = Selection("perplexity", False, None).best(validations((math.nan, 4.0), (1.0, 4.0), (9.0, 5.0)))
    assert lower_is_better is not None and lower_is_better.step == 2
    better = BY_METRIC.best(validations((1.0, 0.1), (9.0, 0.2)))
    assert better is not None and better.step == 2


def test_a_lower_loss_at_the_same_metric_renews_patience() -> None:
    assert not BY_METRIC.out_of_patience(validations((3.0, 0.0), (2.0, 0.0), (1.0, 0.0)))
    assert BY_METRIC.out_of_patience(validations((1.0, 0.0), (2.0, 0.0), (3.0, 0.0)))


def test_a_metric_that_never_moved_is_known() -> None:
    assert not BY_METRIC.moved(validations((3.0, 0.0), (2.0, None), (1.0, 0.0)))
    assert BY_METRIC.moved(validations((3.0, 0.0), (1.0, 0.1)))
    assert BY_METRIC.moved(validations((3.0, 0.0), (2.0, None)))
    assert BY_LOSS.moved(validations((3.0, None), (3.0, None)))


def test_what_the_loss_decided_is_told() -> None:
    assert describe_ties(BY_METRIC, validations((3.0, 0.0), (1.0, None), (2.0, 0.0))) == (
        "rougeL was 0.000 at all 2 validations, so the validation loss chose step 3. Set evaluation.select_by to loss, "
        "or to a metric that gives credit for part of an answer, such as chrf."
    )
    assert describe_ties(BY_METRIC, validations((3.0, 0.5), (2.0, 0.1), (4.0, 0.5))) == (
        "rougeL was 0.500 at steps 1, 3: of these, step 1 has the lowest validation loss."
    )
    assert describe_ties(BY_METRIC, validations((3.0, 0.5), (2.0, 0.1))) == ""
    assert describe_ties(BY_METRIC, validations((3.0, 0.0))) == ""
    assert describe_ties(BY_LOSS, validations((3.0, None), (3.0, None))) == describe_ties(BY_LOSS, ()) == ""
