"""The sampler for a recipe with ranges: results of a method's trials arrive, the next settings leave. Optuna's TPE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.errors import import_extra
from keeptune.search.space import Range, few_digits
from keeptune.search.trials import Result

_MOST_STARTS = 10
_MOST_DRAWS = 30


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
    """Return the settings of the next trials, fewer than `num_next` where all that is left was tried.

    A function of its arguments: each trial has a sampler of its own, seeded by the trial's number. `against_drift`
    makes the drift a second objective, beside the value.
    """
    known = [result.trial.params for result in results]
    found: list[dict[str, Any]] = []
    for number in range(len(results), len(results) + num_next):
        for draw in range(_MOST_DRAWS):
            study = _study(ranges, results, higher_is_better=higher_is_better, against_drift=against_drift)
            study.sampler = _sampler((seed, number, draw), num_trials=num_trials)
            asked = study.ask({r.key: distribution(r) for r in ranges})
            new = settings(asked.params, ranges)
            if new not in known and new not in found:
                found.append(new)
                break
    return found


def _sampler(seed: tuple[int, int, int], *, num_trials: int) -> Any:
    import numpy as np

    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    num_starts = min(_MOST_STARTS, max(1, num_trials // 3))
    return optuna().samplers.TPESampler(seed=number, n_startup_trials=num_starts)


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
    """
    finished = [result for result in results if result.value is not None]
    varied = [r for r in ranges if len({json.dumps(result.trial.params[r.key]) for result in finished}) > 1]
    if len(finished) < _MOST_STARTS // 2 or not varied or len({result.value for result in finished}) < 2:
        return {}
    library = optuna()
    study = _study(ranges, finished, higher_is_better=higher_is_better)
    found = library.importance.get_param_importances(
        study,
        evaluator=library.importance.PedAnovaImportanceEvaluator(),
        params=[r.key for r in varied],
    )
    return {key: float(value) for key, value in found.items()}
