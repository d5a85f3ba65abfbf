"""Is the best trial better than the second? Both, repeated with further seeds, arrive; a verdict leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.search.rounds import REPEATS, contenders
from keeptune.search.trials import Result, ranked


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the two best trials with its values for all seeds, the first one's first."""

    name: str
    number: int
    params: Mapping[str, Any]
    values: tuple[float, ...]
    feasible: bool

    @property
    def mean(self) -> float:
        """The mean value over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """The largest less the smallest value."""
        return max(self.values) - min(self.values)


@dataclass(frozen=True, slots=True)
class Winner:
    """The chosen trial of a method, the one that it was held against, and what the difference is worth.

    `difference` is that of the means over seeds, `threshold` what it must exceed: twice its paired standard error over
    the validation records, or the larger spread over seeds. None where there was no second.
    """

    chosen: Contender
    second: Contender | None
    difference: float | None
    threshold: float | None

    @property
    def is_real(self) -> bool | None:
        """Whether the difference is more than chance and seeds make."""
        if self.difference is None or self.threshold is None:
            return None
        return abs(self.difference) > self.threshold


def repeated(results: Mapping[str, Result], *, higher_is_better: bool) -> list[Contender]:
    """Return the two best trials, or the only one, each with its values for all seeds that came to a value."""
    best = contenders(results, higher_is_better=higher_is_better)
    if not best:
        first = [result for result in results.values() if not result.trial.repeat and result.trial.share == 1.0]
        best = ranked(first, higher_is_better=higher_is_better)[:1]
    return [_contender(result, results) for result in best]


def _contender(result: Result, results: Mapping[str, Result]) -> Contender:
    trial = result.trial
    names = [f"{trial.name}-seed-{repeat}" for repeat in REPEATS]
    again = [results[name] for name in names if name in results]
    values = [r.value for r in (result, *again) if r.value is not None]
    return Contender(trial.name, trial.number, trial.params, tuple(values), result.feasible)


def decide(pair: Sequence[Contender], *, higher_is_better: bool, standard_error: float | None = None) -> Winner:
    """Return the better of the two by its mean over seeds; one that keeps the budgets goes before one that does not.

    `standard_error` is that of the mean difference over the validation records, paired.
    """
    if len(pair) == 1:
        return Winner(pair[0], None, None, None)
    sign = 1.0 if higher_is_better else -1.0
    chosen, second = sorted(pair, key=lambda c: (not c.feasible, -sign * c.mean, c.number))
    threshold = max(2.0 * (standard_error or 0.0), chosen.spread, second.spread)
    return Winner(chosen, second, chosen.mean - second.mean, threshold)
