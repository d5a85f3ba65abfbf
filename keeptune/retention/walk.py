"""Candidates, budgets and a way to measure what each lost arrive; those certified to keep every budget leave.

Each candidate is a path of models from near the base to the fully tuned one: alpha scales what tuning changed, and at
0 nothing is lost. The path is walked upward until a test fails (fixed-sequence Learn-then-Test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from keeptune.retention.budget import Budget
from keeptune.retention.drops import Drops
from keeptune.retention.pvalues import PValue, p_value, records_needed, upper_bound

# The level of the test that a suite on which nothing is certified lost more than its budget.
_WATCH_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tuned model and the alphas at which it is tested, in this order, fixed before the certify records are read."""

    name: str
    alphas: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One model on a candidate's path."""

    candidate: str
    alpha: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One test: of one choice, on one suite, at `delta`.

    `upper_bound` is the smallest budget that the test would have certified, in the metric's units, None where there is
    none. `num_records_needed` is None where the suite is certified, and where no number of records would do.
    """

    choice: Choice
    suite: str
    budget: Budget
    delta: float
    measured: PValue
    upper_bound: float | None
    certified: bool
    num_records_needed: int | None


@dataclass(frozen=True, slots=True)
class Walk:
    """The last test of each choice on each suite, by candidate, and the choices that keep the budget on every suite.

    With a chance of at least 1 - `delta`, every one of `certified` truly does.
    """

    cells: tuple[Cell, ...]
    certified: tuple[Choice, ...]
    delta: float


def walk(
    candidates: Sequence[Candidate],
    *,
    budgets: Mapping[str, Budget],
    delta: float,
    drops_at: Callable[[str, float], Mapping[str, Drops]],
    watched: Mapping[str, Budget] = MappingProxyType({}),
) -> Walk:
    """Walk each candidate's path to its first failure, at an equal share of `delta`.

    `drops_at` takes a candidate's name and an alpha, and measures every suite of `budgets` and `watched`; it is not
    asked for what lies beyond a failure. That a choice breaks some budget is refuted only where each suite's test
    refutes it, so the largest p-value counts and suites need no correction (intersection-union). In a fixed order, the
    first broken budget must pass a test before any later one is claimed: a path errs with a chance of its own delta at
    most, and all paths together with that of their sum. A path that was walked to its end needs its delta no more: the
    others share it, and go on from where they failed.

    Nothing is certified for a `watched` suite, but a choice that is shown to lose more than the budget there fails.

    Sources: Angelopoulos et al. 2021, "Learn then Test" (arXiv 2110.01052), fixed-sequence testing; Bretz et al. 2009,
    "A graphical approach to sequentially rejective multiple test procedures", for what is passed on.
    """
    assert budgets, "no suite to certify"

    measured: dict[Choice, Mapping[str, Drops]] = {}

    def tested(choice: Choice, *, delta: float) -> list[Cell]:
        if choice not in measured:
            measured[choice] = drops_at(choice.candidate, choice.alpha)
        drops = measured[choice]
        assert set(drops) == {*budgets, *watched}, "suites measured are not the suites with a budget"
        over = {suite: budget for suite, budget in watched.items() if _is_over(drops[suite], budget)}
        return _test(choice, drops, budgets={**budgets, **over}, delta=delta)

    walked: dict[Candidate, dict[Choice, list[Cell]]] = {candidate: {} for candidate in candidates}
    waiting = list(candidates)
    while waiting:
        share = delta / len(waiting)
        stopped = [one for one in waiting if not _reaches_its_end(one, walked[one], test=partial(tested, delta=share))]
        if len(stopped) == len(waiting):
            break
        waiting = stopped
    of_choices = [(choice, cells) for own in walked.values() for choice, cells in own.items()]
    certified = [choice for choice, cells in of_choices if _is_certified(cells)]
    return Walk(tuple(cell for _, cells in of_choices for cell in cells), tuple(certified), delta)


def _reaches_its_end(
    candidate: Candidate, tested: dict[Choice, list[Cell]], *, test: Callable[[Choice], list[Cell]]
) -> bool:
    """Walk a path on from its first choice in `tested` that is not certified; tell whether its last one is."""
    for alpha in candidate.alphas:
        choice = Choice(candidate.name, alpha)
        if choice not in tested or not _is_certified(tested[choice]):
            tested[choice] = test(choice)
        if not _is_certified(tested[choice]):
            return False
    return True


def _is_certified(cells: Sequence[Cell]) -> bool:
    return all(cell.certified for cell in cells)


def choose(
    certified: Sequence[Choice],
    *,
    validation: Callable[[str, float], float],
    loss: Callable[[str, float], float],
    higher_is_better: bool,
) -> Choice | None:
    """Return the certified choice that is best on validation; of equals the lowest loss, alpha, then the first.

    The choice within the certified set is free: all of it keeps the budgets together.
    """
    sign = 1.0 if higher_is_better else -1.0

    def merit(choice: Choice) -> tuple[float, float, float]:
        value, nats = sign * validation(choice.candidate, choice.alpha), loss(choice.candidate, choice.alpha)
        return (
            value if math.isfinite(value) else -math.inf,
            -nats if math.isfinite(nats) else -math.inf,
            -choice.alpha,
        )

    return max(certified, key=merit, default=None)


def _test(choice: Choice, drops: Mapping[str, Drops], *, budgets: Mapping[str, Budget], delta: float) -> list[Cell]:
    cells = []
    for suite, budget in budgets.items():
        measured = p_value(drops[suite], budget=budget.amount)
        certified = measured.p <= delta
        # The test's p-value rises a little with the budget here and there: the verdict is on the budget itself.
        nearest = min if certified else max
        bound = nearest(upper_bound(drops[suite], delta=delta), budget.amount)
        cells.append(
            Cell(
                choice=choice,
                suite=suite,
                budget=budget,
                delta=delta,
                measured=measured,
                upper_bound=bound if math.isfinite(bound) else None,
                certified=certified,
                num_records_needed=(
                    None if certified else records_needed(drops[suite], budget=budget.amount, delta=delta)
                ),
            )
        )
    return cells


def _is_over(drops: Drops, budget: Budget) -> bool:
    """Tell whether a test shows that more than the budget was lost."""
    gained = replace(drops, values_R=-drops.values_R)
    return p_value(gained, budget=-budget.amount).p <= _WATCH_LEVEL
