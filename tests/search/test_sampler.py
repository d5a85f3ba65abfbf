"""TPE by ranges: a function of what finished before, choices of any kind, budgets as constraints, importance."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from keeptune.search.sampler import _spread, importances, next_settings
from keeptune.search.space import Range
from keeptune.search.trials import Result, Trial

RANGES = (
    Range("methods.lora.learning_rate", 1e-5, 1e-1, log=True),
    Range("methods.lora.target_modules", choices=('"all-linear"', '["q_proj", "v_proj"]')),
    Range("training.num_train_epochs", 1, 5),
)


def results(number: int, *, with_budget: bool = False, known: bool = True) -> list[Result]:
    """Return trials with the best loss at a rate of 0.001; with a budget, which the upper half breaks, at the top."""
    found: list[Result] = []
    for i in range(number):
        settings = {
            "methods.lora.learning_rate": 10 ** (-5 + 4 * i / number),
            "methods.lora.target_modules": "all-linear" if i % 2 else ["q_proj", "v_proj"],
            "training.num_train_epochs": 1 + i % 5,
        }
        value = 1.0 - i / number if with_budget else abs(i / number - 0.5)
        excess = (1.0 if i > number / 2 else -1.0) if with_budget and known else None
        found.append(Result(Trial(i, settings), "finished", value=value, excess=excess))
    return found


def asked(before: list[Result], *, num_next: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    return next_settings(RANGES, before, num_next=num_next, num_trials=20, seed=seed, higher_is_better=False)


def test_the_same_results_in_any_order_give_the_same_settings_and_another_seed_gives_others() -> None:
    before = results(12)
    assert asked(before) == asked(before[::-1])
    assert asked(before) != asked(before, seed=1)


def test_a_trials_settings_do_not_depend_on_how_many_are_asked_for_with_it() -> None:
    before = results(12)
    assert asked(before, num_next=2) == asked(before)[:2]


def test_settings_are_values_of_the_recipe_inside_their_ranges() -> None:
    for settings in asked([], num_next=12):
        assert 1e-5 <= settings["methods.lora.learning_rate"] <= 1e-1
        assert len(f"{settings['methods.lora.learning_rate']:.15g}".replace("0.", "").strip("0").partition("e")[0]) <= 4
        assert settings["methods.lora.target_modules"] in ("all-linear", ["q_proj", "v_proj"])
        assert settings["training.num_train_epochs"] in (1, 2, 3, 4, 5)


def test_what_was_tried_is_not_tried_again_and_a_small_space_comes_to_its_end() -> None:
    choices = (Range("methods.lora.r", choices=("4", "8", "16")),)
    how: dict[str, Any] = {"num_trials": 8, "seed": 0, "higher_is_better": False}
    first = next_settings(choices, [], num_next=8, **how)
    assert sorted(settings["methods.lora.r"] for settings in first) == [4, 8, 16]
    before = [Result(Trial(i, settings), "finished", value=1.0) for i, settings in enumerate(first)]
    assert next_settings(choices, before, num_next=5, **how) == []


def test_of_few_settings_every_one_is_tried_though_few_of_them_do_well() -> None:
    ranges = (Range("methods.lora.r", choices=("4", "8", "16", "32")), Range("training.num_train_epochs", 1, 3))
    before: list[Result] = []
    while new := next_settings(ranges, before, num_next=1, num_trials=99, seed=0, higher_is_better=False):
        value = abs(new[0]["methods.lora.r"] - 16) / 10 + new[0]["training.num_train_epochs"]
        before.append(Result(Trial(len(before), new[0]), "finished", value=value))
    assert len(before) == len({tuple(result.trial.params.values()) for result in before}) == 12


def test_a_setting_with_a_step_is_one_of_its_steps() -> None:
    ranges = (Range("methods.full.l2_base", 0.00125, 0.09925, step=0.001),)
    before: list[Result] = []
    for i in range(4):
        (new,) = next_settings(ranges, before, num_next=1, num_trials=4, seed=1, higher_is_better=False)
        steps = (new["methods.full.l2_base"] - 0.00125) / 0.001
        assert steps == pytest.approx(round(steps), abs=1e-6)
        before.append(Result(Trial(i, new), "finished", value=float(i)))


def test_settings_that_break_a_budget_are_left_for_those_that_keep_it() -> None:
    rates = [s["methods.lora.learning_rate"] for s in asked(results(20, with_budget=True), num_next=12)]
    free = [s["methods.lora.learning_rate"] for s in asked(results(20, with_budget=True, known=False), num_next=12)]
    assert sum(rate > 1e-3 for rate in rates) < sum(rate > 1e-3 for rate in free)


def test_with_drift_as_a_second_objective_settings_of_little_drift_are_tried_too() -> None:
    before = [
        replace(result, drift=float(result.trial.number)) for result in results(20, with_budget=True, known=False)
    ]
    how: dict[str, Any] = {"num_next": 12, "num_trials": 20, "seed": 0, "higher_is_better": False}
    rates = {
        against: [s["methods.lora.learning_rate"] for s in next_settings(RANGES, before, against_drift=against, **how)]
        for against in (False, True)
    }
    # Little drift comes with a low rate here, a good value with a high one.
    assert sum(rate < 1e-3 for rate in rates[True]) > sum(rate < 1e-3 for rate in rates[False])


def test_where_no_drift_was_measured_the_value_alone_counts() -> None:
    how: dict[str, Any] = {"num_next": 4, "num_trials": 20, "seed": 0, "higher_is_better": False}
    alone = next_settings(RANGES, results(12), **how)
    assert next_settings(RANGES, results(12), against_drift=True, **how) == alone


def test_failed_trials_are_no_results() -> None:
    before = results(12)
    failed = Result(Trial(12, before[0].trial.params), "failed", reason="killed")
    assert asked([*before, failed], num_next=1) != asked(before, num_next=1)
    assert all(settings != failed.trial.params for settings in asked([*before, failed]))


def test_the_setting_that_makes_the_difference_is_the_most_important_and_one_that_is_the_same_is_none() -> None:
    found = importances(RANGES, results(16), higher_is_better=False)
    assert max(found, key=lambda key: found[key]) == "methods.lora.learning_rate"
    assert abs(sum(found.values()) - 1.0) < 1e-9
    alike = [Result(Trial(i, {RANGES[0].key: 1e-3}), "finished", value=float(i)) for i in range(8)]
    assert importances(RANGES[:1], alike, higher_is_better=False) == {}
    assert importances(RANGES, results(3), higher_is_better=False) == {}


def test_importance_does_not_depend_on_how_much_wider_a_range_is_than_what_was_tried() -> None:
    rate, epochs, rank = "methods.lora.learning_rate", "training.num_train_epochs", "methods.lora.r"
    settings = [(2e-4, 3, 8), (6e-5, 3, 8), (6e-4, 3, 8), (3e-4, 3, 8), (1e-4, 3, 8), (2e-4, 6, 8), (2e-4, 1, 8),
                (2e-4, 6, 32), (3e-4, 6, 8), (1e-4, 6, 8)]  # fmt: skip
    tried = [
        Result(Trial(i, {rate: r, epochs: e, rank: k}), "finished", value=3.0 / e + 0.05 * (k > 8) + 10 * abs(r - 2e-4))
        for i, (r, e, k) in enumerate(settings)
    ]
    ranges = (Range(rate, 1e-12, 1e3, log=True), Range(epochs, 1, 1_000_000), Range(rank, 1, 1_000_000))
    found = importances(ranges, tried, higher_is_better=False)
    # With ranges that hold no more than what was tried.
    narrow = (Range(rate, 6e-5, 6e-4, log=True), Range(epochs, 1, 6), Range(rank, 8, 32))
    assert found == pytest.approx(importances(narrow, tried, higher_is_better=False))


def test_the_first_settings_are_spread_over_the_range() -> None:
    ranges = (Range("methods.full.learning_rate", 1e-5, 1e-3, log=True),)
    for seed in range(20):
        first = next_settings(ranges, [], num_next=4, num_trials=4, seed=seed, higher_is_better=False)
        places = sorted(math.log10(one["methods.full.learning_rate"]) for one in first)
        # Of two decades: no gap below a fifth of one, and no end further off than a decade.
        assert min(b - a for a, b in itertools.pairwise([*places])) > 0.2
        assert places[0] < -4.0 < places[-1]


def test_settings_that_are_nearly_those_of_an_earlier_trial_are_not_tried() -> None:
    ranges = (Range("methods.full.learning_rate", 1e-5, 1e-3, log=True), Range("methods.full.r", choices=("4", "8")))
    before: list[Result] = []
    for i in range(8):
        (new,) = next_settings(ranges, before, num_next=1, num_trials=8, seed=1, higher_is_better=False)
        # All is best at one place, to which TPE comes back again and again.
        value = abs(math.log10(new["methods.full.learning_rate"]) + 3.05)
        before.append(Result(Trial(i, new), "finished", value=value))
    for rank in (4, 8):
        rates = sorted(math.log10(r.trial.params["methods.full.learning_rate"]) for r in before
                       if r.trial.params["methods.full.r"] == rank)  # fmt: skip
        assert all(b - a > 0.99 * 2 * 0.25 / 8 for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize(
    ("range_", "allowed"),
    [
        (Range("training.num_train_epochs", 1, 3), {1, 2, 3}),
        (Range("methods.full.l2_base", 0.0, 0.2, step=0.05), {0.0, 0.05, 0.1, 0.15, 0.2}),
        (Range("methods.lora.r", 1, 8, log=True), set(range(1, 9))),
        (Range("methods.lora.r", choices=("4", "8")), {4, 8}),
    ],
)
def test_the_first_settings_are_values_of_any_range(range_: Range, allowed: set[Any]) -> None:
    found = [_spread((range_,), number, seed=0)[range_.key] for number in range(30)]
    assert set(found) <= allowed and len(set(found)) >= len(allowed) - 1
    assert all(type(value) is type(next(iter(allowed))) for value in found)
