"""The sampler for a recipe with ranges: results of a method's trials arrive, the next settings leave. Optuna's TPE."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from keeptune.errors import import_extra
from keeptune.search.space import Range, few_digits
from keeptune.search.trials import Result

# TPE knows nothing from fewer results.
_LEAST_STARTS, _MOST_STARTS = 4, 10
# TPE proposes what did well again and again, where there are few settings; then others are drawn blindly.
_MOST_DRAWS, _MOST_BLIND_DRAWS = 30, 1000


def optuna() -> Any:
    """Return Optuna, quiet.

    Raises:
        RecipeError: it is not installed.
    """
    library = import_extra("optuna", extra="search")
    library.logging.set_verbosity(library.logging.ERROR)
    return library


def distribution(range_: Range) -> Any:
    """Return the range in Optuna's words."""
    kinds = import_extra("optuna.distributions", extra="search")
    if range_.choices:
        return kinds.CategoricalDistribution(range_.choices)
    if isinstance(range_.low, int) and isinstance(range_.high, int):
        return kinds.IntDistribution(range_.low, range_.high, log=range_.log, step=int(range_.step or 1))
    return kinds.FloatDistribution(range_.low, range_.high, log=range_.log, step=range_.step)


def drawn(params: Mapping[str, Any], ranges: Sequence[Range]) -> dict[str, Any]:
    """Return settings in Optuna's words: a choice is a JSON text."""
    texts = {r.key for r in ranges if r.choices}
    return {key: json.dumps(value, sort_keys=True) if key in texts else value for key, value in params.items()}


def settings(params: Mapping[str, Any], ranges: Sequence[Range]) -> dict[str, Any]:
    """Return settings from Optuna's words, fractions with few digits."""
    found = dict(params)
    for range_ in ranges:
        value = params[range_.key]
        if range_.choices:
            found[range_.key] = json.loads(value)
        elif range_.step is not None and isinstance(value, float):
            # 0.15, not 0.15000000000000002; fewer digits could be none of the steps.
            found[range_.key] = min(range_.high, float(f"{value:.12g}"))
        elif isinstance(value, float):
            found[range_.key] = min(range_.high, max(range_.low, few_digits(value)))
    return found


def next_settings(
    ranges: Sequence[Range],
    results: Sequence[Result],
    *,
    num_next: int,
    num_trials: int,
    seed: int,
    higher_is_better: bool,
    against_drift: bool = False,
) -> list[dict[str, Any]]:
    """Return the settings of the next trials, fewer than `num_next` where all that there are were tried.

    The first ones are spread over the ranges; what lies as near to one that was tried as to teach nothing is passed by.
    A function of its arguments: each trial has a sampler of its own, seeded by the trial's number. `against_drift`
    makes the drift a second objective, beside the value, once it was measured of a trial.
    """
    both = against_drift and any(result.drift is not None for result in results)
    num_starts = min(_MOST_STARTS, max(_LEAST_STARTS, num_trials // 3))
    tried = [result.trial.params for result in results]
    for number in range(len(results), len(results) + num_next):
        study = partial(_study, ranges, results, higher_is_better=higher_is_better, against_drift=both)
        draws = _draws(study, ranges, seed=(seed, number), num_starts=num_starts)
        if number < num_starts:
            draws = itertools.chain([_spread(ranges, number, seed=seed)], draws)
        fresh = (one for one in draws if not any(_alike(one, other, ranges, num_trials=num_trials) for other in tried))
        new = next(fresh, None)
        if new is None:
            break
        tried.append(new)
    return [dict(params) for params in tried[len(results) :]]


def _spread(ranges: Sequence[Range], number: int, *, seed: int) -> dict[str, Any]:
    """Return the settings of a number in a sequence that fills the ranges evenly, wherever it is broken off.

    Source: Roberts 2018, "The unreasonable effectiveness of quasirandom sequences": steps of 1/φ, 1/φ² …, φ being the
    root of x^(d+1) = x + 1.
    """
    import numpy as np

    root = 2.0
    for _ in range(40):
        root = (1.0 + root) ** (1.0 / (len(ranges) + 1))
    starts = np.random.default_rng(seed).random(len(ranges))
    places = [float(start + number * root ** -(i + 1)) % 1.0 for i, start in enumerate(starts)]
    params = {r.key: _at(r, place) for r, place in zip(ranges, places, strict=True)}
    return settings(params, ranges)


def _at(range_: Range, place: float) -> Any:
    """Return the value, in Optuna's words, at a place from 0 to 1 in a range."""
    if range_.choices:
        return range_.choices[int(place * len(range_.choices))]
    low, high = range_.low, range_.high
    whole = isinstance(low, int) and isinstance(high, int)
    if range_.log:
        value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        return round(value) if whole else value
    step = range_.step or (1 if whole else None)
    if step is None:
        return low + place * (high - low)
    value = low + int(place * (round((high - low) / step) + 1)) * step
    return int(value) if whole else value


def _alike(one: Mapping[str, Any], other: Mapping[str, Any], ranges: Sequence[Range], *, num_trials: int) -> bool:
    """Tell whether two settings are so near each other that the second teaches nothing."""
    return all(
        one[r.key] == other[r.key]
        or (not r.choices and r.step is None and isinstance(r.low, float) and _gap(r, one, other) < 0.25 / num_trials)
        for r in ranges
    )


def _gap(range_: Range, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    scale = math.log if range_.log else float
    return abs(scale(one[range_.key]) - scale(other[range_.key])) / (scale(range_.high) - scale(range_.low))


def _draws(
    make_study: Callable[[], Any], ranges: Sequence[Range], *, seed: tuple[int, int], num_starts: int
) -> Iterator[dict[str, Any]]:
    """Yield settings that TPE draws from what a study knows, then some that know nothing."""
    import numpy as np

    samplers, asked = optuna().samplers, {r.key: distribution(r) for r in ranges}

    def seeded(draw: int) -> int:
        return int(np.random.SeedSequence((*seed, draw)).generate_state(1)[0])

    for draw in range(_MOST_DRAWS):
        study = make_study()
        study.sampler = samplers.TPESampler(seed=seeded(draw), n_startup_trials=num_starts)
        yield settings(study.ask(asked).params, ranges)
    study = make_study()
    study.sampler = samplers.RandomSampler(seed=seeded(_MOST_DRAWS))
    for _ in range(_MOST_BLIND_DRAWS):
        yield settings(study.ask(asked).params, ranges)


def _study(
    ranges: Sequence[Range], results: Sequence[Result], *, higher_is_better: bool, against_drift: bool = False
) -> Any:
    """Return a study in memory that knows the finished trials."""
    library = optuna()
    directions = ["maximize" if higher_is_better else "minimize", *(["minimize"] if against_drift else [])]
    study = library.create_study(directions=directions)
    for result in sorted(results, key=lambda r: r.trial.number):
        values = [result.value, *([result.drift] if against_drift else [])]
        if None not in values:
            constraints = {} if result.excess is None else {"budget": result.excess}
            study.add_trial(
                library.trial.create_trial(
                    params=drawn(result.trial.params, ranges),
                    distributions={r.key: distribution(r) for r in ranges},
                    values=values,
                    constraints=constraints,
                )
            )
    return study


def importances(ranges: Sequence[Range], results: Sequence[Result], *, higher_is_better: bool) -> dict[str, float]:
    """Return how much of the difference between trials each setting makes, in [0, 1]; empty where none can be told.

    PED-ANOVA, which asks how the best trials differ from all. Settings that were the same in all trials make none.
    It lays a grid over each range, here over what was tried of it: a preset's are so wide that all falls into one cell.
    """
    finished = [result for result in results if result.value is not None]
    varied = [r for r in ranges if len({json.dumps(result.trial.params[r.key]) for result in finished}) > 1]
    if len(finished) < _MOST_STARTS // 2 or not varied or len({result.value for result in finished}) < 2:
        return {}
    library = optuna()
    tried = [_narrowed(range_, finished) if range_ in varied else range_ for range_ in ranges]
    study = _study(tried, finished, higher_is_better=higher_is_better)
    found = library.importance.get_param_importances(
        study,
        evaluator=library.importance.PedAnovaImportanceEvaluator(),
        params=[r.key for r in varied],
    )
    return {key: float(value) for key, value in found.items()}


def _narrowed(range_: Range, results: Sequence[Result]) -> Range:
    if range_.choices:
        return range_
    values = [result.trial.params[range_.key] for result in results]
    return replace(range_, low=min(values), high=max(values), step=None)
