"""The preset: learning rates outward and inward until the best is bracketed, then the other settings in their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from keeptune.search.ladder import Start, bounds, next_settings
from keeptune.search.trials import Result, Trial, ranked

RATE, EPOCHS = "methods.full.learning_rate", "training.num_train_epochs"


def climbed(start: Start, value: Callable[[dict[str, Any]], float | None], *, num_trials: int) -> list[Result]:
    """Return the results of a preset's trials, each with a value that its settings give."""
    results: list[Result] = []
    while len(results) < num_trials:
        new = next_settings(start, results, num_left=num_trials - len(results), higher_is_better=False)
        if not new:
            break
        for settings in new:
            found = value(settings)
            trial = Trial(len(results), settings)
            results.append(Result(trial, "finished" if found is not None else "failed", value=found))
    return results


def loss(best: float) -> Callable[[dict[str, Any]], float]:
    return lambda settings: 1.0 + 0.3 * math.log10(settings[RATE] / best) ** 2


@pytest.mark.parametrize("best", [2e-6, 7e-6, 2.3e-5, 2e-4, 1.1e-3, 4e-3])
def test_twelve_trials_come_within_a_hundredth_of_the_best_rate_however_far_it_is(best: float) -> None:
    results = climbed(Start({RATE: 2e-5, EPOCHS: 3}, False), loss(best), num_trials=12)
    assert len(results) == 12
    assert ranked(results, higher_is_better=False)[0].value <= 1.01  # pyright: ignore[reportOptionalOperand]


def test_the_first_three_are_the_recipes_rate_and_its_third_and_threefold() -> None:
    results = climbed(Start({RATE: 3e-4, EPOCHS: 3}, False), loss(3e-4), num_trials=3)
    assert [r.trial.params[RATE] for r in results] == [3e-4, 1e-4, 9e-4]
    assert {r.trial.params[EPOCHS] for r in results} == {3}


def test_after_the_rate_come_epochs_then_replay_then_the_rank_with_its_alpha() -> None:
    settings = {RATE: 1e-3, "methods.full.replay_fraction": 0.0, "methods.full.replay_kl": 0.0,
                "methods.full.r": 8, "methods.full.lora_alpha": 16, EPOCHS: 2}  # fmt: skip
    results = climbed(Start(settings, True), loss(1e-3), num_trials=10)
    names = ("training.num_train_epochs", "methods.full.replay_fraction", "methods.full.r", "methods.full.lora_alpha",
             "methods.full.replay_kl")  # fmt: skip
    assert [tuple(r.trial.params[name] for name in names) for r in results] == [
        *[(2, 0.0, 8, 16, 0.0)] * 5, (4, 0.0, 8, 16, 0.0), (1, 0.0, 8, 16, 0.0), (2, 0.05, 8, 16, 0.0),
        (2, 0.0, 32, 64, 0.0), (2, 0.05, 8, 16, 0.1),
    ]  # fmt: skip


def test_with_four_trials_the_last_one_replays_where_the_best_rate_stands_in_the_middle() -> None:
    settings = {RATE: 1e-3, "methods.full.replay_fraction": 0.0, "methods.full.replay_kl": 0.0, EPOCHS: 2}
    middle = climbed(Start(settings, True), loss(1e-3), num_trials=4)
    assert [r.trial.params["methods.full.replay_fraction"] for r in middle] == [0.0, 0.0, 0.0, 0.05]
    outward = climbed(Start(settings, True), loss(1e-1), num_trials=4)
    assert outward[-1].trial.params[RATE] == 9e-3
    assert not outward[-1].trial.params["methods.full.replay_fraction"]


def test_rates_rise_no_further_where_a_trial_failed() -> None:
    def value(settings: dict[str, Any]) -> float | None:
        return None if settings[RATE] > 5e-3 else loss(1.0)(settings)

    results = climbed(Start({RATE: 1e-3, EPOCHS: 1}, False), value, num_trials=12)
    failed = [r.trial.params[RATE] for r in results if r.value is None]
    assert failed[:3] == [9e-3, 2.7e-2, 5.2e-3]
    assert max(failed[3:]) < 2.7e-2
    assert len(results) == 12


def test_where_all_of_the_first_rates_fail_lower_ones_are_tried() -> None:
    start = Start({RATE: 1.0, EPOCHS: 3}, False)
    results = climbed(start, lambda settings: None if settings[RATE] > 0.2 else loss(1e-2)(settings), num_trials=8)
    assert [r.trial.params[RATE] for r in results][:5] == [1.0, 0.333, 3.0, 0.111, 0.037]
    assert results[-1].value is not None
    assert len(climbed(start, lambda _: None, num_trials=8)) == 5


def test_where_no_answer_is_right_yet_the_rate_rises() -> None:
    start = Start({RATE: 2e-5, EPOCHS: 3}, False)
    results = climbed(start, lambda settings: 1.0 if settings[RATE] < 1e-3 else 0.5, num_trials=8)
    assert [r.trial.params[RATE] for r in results][3:7] == [1.8e-4, 5.4e-4, 1.62e-3, 4.86e-3]


def test_nothing_is_tried_twice_and_four_trials_are_the_first_of_twelve() -> None:
    start = Start({RATE: 2e-5, EPOCHS: 2}, False)
    twelve = [r.trial.params for r in climbed(start, loss(6e-4), num_trials=12)]
    assert len({tuple(settings.items()) for settings in twelve}) == 12
    assert [r.trial.params for r in climbed(start, loss(6e-4), num_trials=4)] == twelve[:4]


def test_the_ladders_settings_stay_inside_its_bounds() -> None:
    start = Start({RATE: 2e-5, "methods.full.r": 8, "methods.full.lora_alpha": 8, EPOCHS: 2}, False)
    limits = {range_.key: range_ for range_ in bounds(start)}
    for result in climbed(start, loss(6e-4), num_trials=12):
        assert all(limits[key].low <= value <= limits[key].high for key, value in result.trial.params.items())
