from __future__ import annotations

import math

from keeptune.training.selection import Selection
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
