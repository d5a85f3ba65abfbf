"""What a search still has to do: a method's trials so far arrive; those of the round that is not at its end leave.

A round's settings depend on the results of the rounds before it alone, so that a search that was killed goes on to the
same trials. What the journal knows of is never proposed anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keeptune.search import ladder, sampler
from keeptune.search.space import Range
from keeptune.search.trials import Result, Trial, front, ranked

NUM_REPEATED, REPEATS = 2, (1, 2)
# Successive halving: shares of the train records, and the best part of the trials that goes on.
_SHARES, _KEPT = (1 / 9, 1 / 3, 1.0), 1 / 3


@dataclass(frozen=True, slots=True)
class Search:
    """How a method's settings are searched for: `num_trials` of them, by `ranges`, or by the ladder from `start`.

    `halving` trains all of them on a ninth of the records first, the better ones on a third, the best on all.
    `against_drift` looks for settings with little drift too, not for the best value alone.
    """

    ranges: tuple[Range, ...]
    start: ladder.Start | None
    num_trials: int
    num_jobs: int
    seed: int
    higher_is_better: bool
    halving: bool = False
    against_drift: bool = False

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the train records that trials are trained on, in their order."""
        return _SHARES if self.halving else (1.0,)


def missing(search: Search, known: Mapping[str, Trial], results: Mapping[str, Result]) -> list[Trial]:
    """Return the trials that are to be made next, those of one round; none where the search is at its end.

    `known` are all trials that were ever queued, by name. Asked when each of them has its result.
    """
    candidates: list[Trial] = []
    while len(candidates) < search.num_trials:
        round_ = _round(search, known, [results[trial.name] for trial in candidates])
        if new := [trial for trial in round_ if trial.name not in results]:
            return new
        if not round_:
            break
        candidates += round_
    for share in search.shares[1:]:
        better = survivors([results[trial.name] for trial in candidates], higher_is_better=search.higher_is_better)
        candidates = [replace(trial, share=share) for trial in better]
        if new := [trial for trial in candidates if trial.name not in results]:
            return new
    top = contenders(results, higher_is_better=search.higher_is_better)
    repeats = [replace(result.trial, repeat=repeat) for result in top for repeat in REPEATS]
    return [trial for trial in repeats if trial.name not in results]


def num_expected(search: Search) -> int:
    """Return how many trials a search comes to, repeats among them, where no more go on than must."""
    total = number = search.num_trials
    for _ in search.shares[1:]:
        number = min(number, _num_kept(number))
        total += number
    return total + (NUM_REPEATED * len(REPEATS) if number >= NUM_REPEATED else 0)


def _num_kept(number: int) -> int:
    return max(NUM_REPEATED, math.ceil(_KEPT * number))


def contenders(results: Mapping[str, Result], *, higher_is_better: bool) -> list[Result]:
    """Return the two best of the trials on all records, to be repeated with further seeds; none where one is all."""
    first = [result for result in results.values() if not result.trial.repeat and result.trial.share == 1.0]
    best = ranked(first, higher_is_better=higher_is_better)[:NUM_REPEATED]
    return best if len(best) == NUM_REPEATED else []


def survivors(results: Sequence[Result], *, higher_is_better: bool) -> list[Trial]:
    """Return the trials that go on to more records: the best third, two at least, and what none dominates.

    A trial dominates another where it is better in value and no worse in drift, or the other way round.

    All of them were trained on as many records, each with a schedule of its own: like is compared with like.
    """
    order = ranked(results, higher_is_better=higher_is_better)
    kept = {r.trial.name for r in order[: _num_kept(len(results))]}
    kept |= {r.trial.name for r in front(results, higher_is_better=higher_is_better)}
    return [result.trial for result in results if result.trial.name in kept]


def _round(search: Search, known: Mapping[str, Trial], before: Sequence[Result]) -> list[Trial]:
    """Return the trials of the round after these results, as the journal knows them or as they are proposed now."""
    share, base = search.shares[0], len(before)
    num_left = search.num_trials - base
    num_next = min(search.num_jobs, num_left)
    numbers = [Trial(base + i, {}, share=share).name for i in range(num_next)]
    if search.start is None and all(name in known for name in numbers):
        return [known[name] for name in numbers]
    round_ = [Trial(base + i, settings, share=share) for i, settings in enumerate(_settings(search, before))]
    return [known.get(trial.name, trial) for trial in round_]


def _settings(search: Search, before: Sequence[Result]) -> list[dict[str, Any]]:
    num_left = search.num_trials - len(before)
    if search.start is not None:
        higher = search.higher_is_better
        return ladder.next_settings(search.start, before, num_left=num_left, higher_is_better=higher)
    return sampler.next_settings(
        search.ranges,
        before,
        num_next=min(search.num_jobs, num_left),
        num_trials=search.num_trials,
        seed=search.seed,
        higher_is_better=search.higher_is_better,
        against_drift=search.against_drift,
    )
