"""Which of the two best trials is chosen, and whether it is better than chance and seeds make."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t

from keeptune.search.trials import Result, Trial, dominated, front, ranked
from keeptune.search.winner import Contender, best_first, decide, repeated


def contender(number: int, *values: float, excess: float | None = None) -> Contender:
    return Contender(f"trial-{number:04d}", number, {}, values, values[1:], excess)


def result(
    number: int, value: float | None, *, repeat: int = 0, drift: float | None = 0.0, excess: float | None = None
) -> Result:
    state = "finished" if value is not None else "failed"
    return Result(Trial(number, {}, repeat), state, value=value, drift=drift, excess=excess)


def test_the_mean_over_seeds_chooses_in_the_metrics_direction() -> None:
    pair = [contender(0, 1.0, 1.4, 1.2), contender(1, 1.1, 1.0, 1.2)]
    assert decide(pair, higher_is_better=False).chosen.number == 1
    assert decide(pair, higher_is_better=True).chosen.number == 0


def test_the_gain_is_that_of_the_further_seeds_with_the_interval_of_welch() -> None:
    pair = [contender(0, 0.1, 1.00, 1.10), contender(1, 9.0, 1.50, 1.70)]
    found = decide(pair, higher_is_better=False)
    # Spread: (0.005 + 0.02) / 2 freedoms, twice over two seeds; t(2) at 97.5 % is 4.3027.
    half = 4.3027 * math.sqrt((0.005 + 0.02) / 2)
    assert (found.gain, found.low, found.high) == pytest.approx((0.55, 0.55 - half, 0.55 + half), abs=1e-4)
    assert found.is_likely
    # The records' error is known from many of them, so that Student's factor falls as the interval widens.
    wide = decide(pair, higher_is_better=False, standard_error=0.4)
    assert wide.high is not None and wide.high - 0.55 == pytest.approx(
        t.ppf(0.975, 2 * ((0.0125 + 0.16) / 0.0125) ** 2) * math.sqrt(0.0125 + 0.16)
    )
    assert wide.is_likely is False
    higher = decide([contender(0, 1.0, 1.2, 1.1), contender(1, 0.5, 0.5, 0.6)], higher_is_better=True)
    assert higher.chosen.number == 0 and higher.gain == pytest.approx(0.6)


def test_of_equal_settings_the_winner_is_hardly_ever_called_likely_better() -> None:
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        # The two best of twelve settings that are all alike, by the first seed; the second is a little worse there.
        first = np.sort(rng.normal(size=12))[:2]
        pair = [contender(i, float(value), *rng.normal(size=2)) for i, value in enumerate(first)]
        called += decide(pair, higher_is_better=False).is_likely is True
    # 2.5 % are meant on that side; above 20 of 400 would have a chance of 1 in 500.
    assert called <= 20


def test_with_too_few_further_seeds_nothing_is_said_of_chance() -> None:
    for pair in ([contender(0, 1.0, 1.1), contender(1, 2.0, 2.1)], [contender(0, 1.0), contender(1, 2.0, 2.1, 2.2)]):
        found = decide(pair, higher_is_better=False)
        assert found.second is not None and (found.gain, found.is_likely) == (None, None)
    alike = decide(
        [contender(0, 1.0, 1.0, 1.0), contender(1, 2.0, 2.0, 2.0)], higher_is_better=False, standard_error=0.1
    )
    assert (alike.low, alike.high) == pytest.approx((1.0 - 0.196, 1.0 + 0.196))


def test_a_trial_that_keeps_the_budgets_goes_before_a_better_one_that_does_not() -> None:
    found = decide([contender(0, 1.0, excess=0.1), contender(1, 2.0, excess=-0.9)], higher_is_better=False)
    assert found.chosen.number == 1
    assert (found.chosen.feasible, contender(0, 1.0, excess=0.1).feasible) == (True, False)
    # Of those that keep them the better one, however much of the budget is left.
    assert (
        decide([contender(0, 1.0, excess=-0.1), contender(1, 2.0, excess=-0.9)], higher_is_better=False).chosen.mean
        == 1
    )


def test_where_neither_keeps_the_budgets_the_nearer_one_is_chosen_whatever_its_value() -> None:
    found = decide([contender(0, 1.0, excess=2.0), contender(1, 3.0, excess=0.5)], higher_is_better=False)
    assert found.chosen.number == 1 and not found.chosen.feasible


def test_a_budget_is_kept_in_the_mean_over_seeds_as_the_value_is_one() -> None:
    first = [result(0, 1.0, excess=-0.1), result(1, 2.0, excess=-0.1)]
    again = [result(0, 1.0, repeat=1, excess=0.5), result(0, 1.0, repeat=2, excess=0.5),
             result(1, 2.0, repeat=1, excess=0.05)]  # fmt: skip
    pair = repeated({r.trial.name: r for r in [*first, *again]}, higher_is_better=False)
    assert [c.excess for c in pair] == pytest.approx([0.3, -0.025])
    assert decide(pair, higher_is_better=False).chosen.number == 1


def test_one_trial_alone_is_chosen_and_nothing_is_said_of_chance() -> None:
    found = decide([contender(0, 1.0)], higher_is_better=False)
    assert (found.chosen.number, found.second, found.is_likely) == (0, None, None)


def test_only_first_seeds_are_ranked_and_a_seed_that_failed_is_left_out() -> None:
    results = [result(0, 2.0), result(1, 1.0), result(2, 1.5), result(1, 9.0, repeat=1), result(1, 0.1, repeat=2),
               result(2, None, repeat=1), result(2, 1.4, repeat=2)]  # fmt: skip
    pair = repeated({r.trial.name: r for r in results}, higher_is_better=False)
    assert [(c.number, c.values) for c in pair] == [(1, (1.0, 9.0, 0.1)), (2, (1.5, 1.4))]
    assert [c.number for c in repeated({"trial-0000": result(0, 2.0)}, higher_is_better=False)] == [0]


def test_trials_that_keep_the_budgets_come_first_then_those_nearest_to_them() -> None:
    results = [result(0, 1.0, excess=2.0), result(1, 3.0, excess=-0.1), result(2, 2.0, excess=0.0),
               result(3, 0.5, excess=0.5), result(4, None), result(5, float("nan"), excess=-1.0)]  # fmt: skip
    assert [r.trial.number for r in ranked(results, higher_is_better=False)] == [2, 1, 5, 3, 0]
    assert [r.trial.number for r in ranked(results, higher_is_better=True)] == [1, 2, 5, 3, 0]


def test_of_equal_values_the_lowest_validation_loss_comes_first() -> None:
    results = [replace(result(i, 0.0), loss=loss) for i, loss in enumerate([3.0, 1.0, None, 1.0])]
    for higher_is_better in (True, False):
        assert [r.trial.number for r in ranked(results, higher_is_better=higher_is_better)] == [1, 3, 0, 2]
    pair = [replace(contender(i, 0.0), loss=loss) for i, loss in enumerate([3.0, 1.0, None])]
    assert [c.number for c in best_first(pair, higher_is_better=True)] == [1, 0, 2]
    assert decide(pair[:2], higher_is_better=True).chosen.number == 1
    again = {f"trial-{i:04d}": replace(result(i, 0.0), loss=float(2 - i)) for i in range(2)}
    assert [(c.number, c.loss) for c in repeated(again, higher_is_better=True)] == [(1, 1.0), (0, 2.0)]


def test_a_trial_is_dominated_only_where_another_is_as_good_in_value_and_in_drift() -> None:
    one, worse, calmer = result(0, 1.0, drift=0.2), result(1, 1.1, drift=0.3), result(2, 1.2, drift=0.1)
    assert dominated(worse, [one, worse, calmer], higher_is_better=False)
    assert not dominated(calmer, [one, worse, calmer], higher_is_better=False)
    assert not dominated(one, [one], higher_is_better=False)
    assert [r.trial.number for r in front([one, worse, calmer], higher_is_better=False)] == [0, 2]


def test_a_drift_that_was_not_measured_is_neither_more_nor_less_than_one_that_was() -> None:
    unknown, better, worse = result(0, 1.0, drift=None), result(1, 0.5, drift=0.2), result(2, 1.5, drift=0.2)
    assert not dominated(unknown, [better], higher_is_better=False)
    assert not dominated(worse, [unknown], higher_is_better=False)
    assert dominated(result(3, 1.5, drift=None), [unknown], higher_is_better=False)
