"""Which of the two best trials is chosen, and whether it is better than chance and seeds make."""

from __future__ import annotations

import pytest

from keeptune.search.trials import Result, Trial, dominated, front, ranked
from keeptune.search.winner import Contender, decide, repeated


def contender(number: int, *values: float, excess: float | None = None) -> Contender:
    return Contender(f"trial-{number:04d}", number, {}, values, excess)


def result(
    number: int, value: float | None, *, repeat: int = 0, drift: float | None = 0.0, excess: float | None = None
) -> Result:
    state = "finished" if value is not None else "failed"
    return Result(Trial(number, {}, repeat), state, value=value, drift=drift, excess=excess)


def test_the_mean_over_seeds_chooses_in_the_metrics_direction() -> None:
    pair = [contender(0, 1.0, 1.4, 1.2), contender(1, 1.1, 1.0, 1.2)]
    assert decide(pair, higher_is_better=False).chosen.number == 1
    assert decide(pair, higher_is_better=True).chosen.number == 0


@pytest.mark.parametrize(
    ("second", "error", "is_real"),
    [((2.0, 2.1, 2.2), 0.1, True), ((1.3, 1.4, 1.5), 0.1, True), ((2.0, 2.1, 2.2), 0.6, False),
     ((0.9, 2.1, 2.2), 0.1, False)],
)  # fmt: skip
def test_a_difference_is_real_above_two_standard_errors_and_the_spread_over_seeds(
    second: tuple[float, ...], error: float, *, is_real: bool
) -> None:
    found = decide([contender(0, 1.0, 1.1, 1.05), contender(1, *second)], higher_is_better=False, standard_error=error)
    assert found.is_real is is_real
    assert found.difference == pytest.approx(1.05 - sum(second) / 3)


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
    assert (found.chosen.number, found.second, found.is_real) == (0, None, None)


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
