"""Is the best trial better than the second? Both, repeated with further seeds, arrive; a verdict leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.search.rounds import REPEATS, contenders
from keeptune.search.trials import Result, ranked


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the two best trials with its values for all seeds, the first one's first.

    `excess` is the mean over seeds of how far the worst suite is above its budget; None without a budget.
    """

    name: str
    number: int
    params: Mapping[str, Any]
    values: tuple[float, ...]
    excess: float | None = None

    @property
    def mean(self) -> float:
        """The mean value over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def feasible(self) -> bool:
        """Whether the budgets are kept on the probe, in the mean over the seeds."""
        return self.excess is None or self.excess <= 0.0

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
    excesses = [r.excess for r in (result, *again) if r.excess is not None]
    excess = sum(excesses) / len(excesses) if excesses else None
    return Contender(trial.name, trial.number, trial.params, tuple(values), excess)


def best_first(contenders: Sequence[Contender], *, higher_is_better: bool) -> list[Contender]:
    """Return those that keep the budgets by their mean over seeds, then the others, the nearest to the budgets first.

    Equals stay in their order.
    """
    sign = -1.0 if higher_is_better else 1.0
    return sorted(contenders, key=lambda c: (max(0.0, c.excess or 0.0), sign * c.mean))


def decide(pair: Sequence[Contender], *, higher_is_better: bool, standard_error: float | None = None) -> Winner:
    """Return the better of the two by its mean over seeds, or the nearer one to the budgets where it is above them.

    `standard_error` is that of the mean difference over the validation records, paired.
    """
    if len(pair) == 1:
        return Winner(pair[0], None, None, None)
    chosen, second = best_first(pair, higher_is_better=higher_is_better)
    threshold = max(2.0 * (standard_error or 0.0), chosen.spread, second.spread)
    return Winner(chosen, second, chosen.mean - second.mean, threshold)
