"""The sampler for a recipe with ranges: results of a method's trials arrive, the next settings leave. Optuna's TPE."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from keeptune.errors import import_extra
from keeptune.search.space import Range, few_digits
from keeptune.search.trials import Result

_MOST_STARTS = 10
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

    A function of its arguments: each trial has a sampler of its own, seeded by the trial's number. `against_drift`
    makes the drift a second objective, beside the value, once it was measured of a trial.
    """
    both = against_drift and any(result.drift is not None for result in results)
    num_starts = min(_MOST_STARTS, max(1, num_trials // 3))
    tried = [result.trial.params for result in results]
    for number in range(len(results), len(results) + num_next):
        study = partial(_study, ranges, results, higher_is_better=higher_is_better, against_drift=both)
        draws = _draws(study, ranges, seed=(seed, number), num_starts=num_starts)
        new = next((one for one in draws if one not in tried), None)
        if new is None:
            break
        tried.append(new)
    return [dict(params) for params in tried[len(results) :]]


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
