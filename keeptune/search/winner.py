"""Is the best trial better than the second? Both, repeated with further seeds, arrive; a verdict leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from keeptune.search.rounds import REPEATS, contenders
from keeptune.search.trials import Result, is_within, ranked


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the two best trials with its values for all seeds; `fresh` are those of the further ones alone.

    `excess` is the mean over seeds of how far the worst suite is above its budget; None without a budget. `loss` is the
    mean validation loss over seeds, which decides between equal means.
    """

    name: str
    number: int
    params: Mapping[str, Any]
    values: tuple[float, ...]
    fresh: tuple[float, ...] = ()
    excess: float | None = None
    loss: float | None = None

    @property
    def mean(self) -> float:
        """The mean value over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def feasible(self) -> bool:
        """Whether the budgets are kept on the probe, in the mean over the seeds."""
        return is_within(self.excess)


@dataclass(frozen=True, slots=True)
class Winner:
    """The chosen trial of a method, the one that it was held against, and how much better it is.

    `gain`, positive where the chosen one is better, is the difference of the means over the further seeds alone: the
    first seed's values made these two the best, and flatter them. `low` and `high` hold it with 95 % confidence. None
    where there was no second, or too few further seeds.
    """

    chosen: Contender
    second: Contender | None
    gain: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def is_likely(self) -> bool | None:
        """Whether the chosen one is better by more than chance makes."""
        return None if self.low is None else self.low > 0.0


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
    fresh = [r.value for r in again if r.value is not None]
    values = [*([] if result.value is None else [result.value]), *fresh]
    excesses = [r.excess for r in (result, *again) if r.excess is not None]
    excess = sum(excesses) / len(excesses) if excesses else None
    losses = [r.loss for r in (result, *again) if r.loss is not None]
    loss = fmean(losses) if losses else None
    return Contender(trial.name, trial.number, trial.params, tuple(values), tuple(fresh), excess, loss)


def best_first(contenders: Sequence[Contender], *, higher_is_better: bool) -> list[Contender]:
    """Return those that keep the budgets by their mean over seeds, then the others, the nearest to the budgets first.

    Of equal means the lower validation loss stands first; equals in that too stay in their order.
    """
    sign = -1.0 if higher_is_better else 1.0

    def order(contender: Contender) -> tuple[float, float, float]:
        loss = math.inf if contender.loss is None else contender.loss
        return max(0.0, contender.excess or 0.0), sign * contender.mean, loss

    return sorted(contenders, key=order)


def decide(pair: Sequence[Contender], *, higher_is_better: bool, standard_error: float | None = None) -> Winner:
    """Return the better of the two by its mean over seeds, or the nearer one to the budgets where it is above them.

    `standard_error` is that of the mean difference over the validation records, paired. To it comes that of the further
    seeds, which have one spread about their means in both. As that is known from few of them, Student's factor has the
    degrees of freedom of Welch and Satterthwaite.
    """
    from scipy.stats import t

    if len(pair) == 1:
        return Winner(pair[0], None)
    chosen, second = best_first(pair, higher_is_better=higher_is_better)
    fresh = [c.fresh for c in (chosen, second)]
    freedom = sum(len(values) - 1 for values in fresh)
    if not all(fresh) or not freedom:
        return Winner(chosen, second)
    squares = sum((value - fmean(values)) ** 2 for values in fresh for value in values)
    of_seeds = squares / freedom * sum(1.0 / len(values) for values in fresh)
    variance = of_seeds + (standard_error or 0.0) ** 2
    gain = (fmean(fresh[0]) - fmean(fresh[1])) * (1.0 if higher_is_better else -1.0)
    factor = float(t.ppf(0.975, freedom * (variance / of_seeds) ** 2)) if of_seeds else 1.96
    half = factor * math.sqrt(variance)
    return Winner(chosen, second, gain, gain - half, gain + half)
