"""Candidates, budgets and a way to measure what each lost arrive; those certified to keep every budget leave.

Each candidate is a path of models from near the base to the fully tuned one: alpha scales what tuning changed, and at
0 nothing is lost. The path is walked upward until a test fails (fixed-sequence Learn-then-Test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Every test that was made, in order, and the choices that keep the budget on every suite.

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
    most, and all paths together with that of their sum.

    Nothing is certified for a `watched` suite, but a choice that is shown to lose more than the budget there fails.

    Source: Angelopoulos et al. 2021, "Learn then Test" (arXiv 2110.01052), fixed-sequence testing.
    """
    assert budgets, "no suite to certify"
    cells: list[Cell] = []
    certified: list[Choice] = []
    for candidate in candidates:
        for alpha in candidate.alphas:
            choice = Choice(candidate.name, alpha)
            drops = drops_at(candidate.name, alpha)
            assert set(drops) == {*budgets, *watched}, "suites measured are not the suites with a budget"
            tested = _test(choice, drops, budgets=budgets, delta=delta / len(candidates))
            over = {suite: budget for suite, budget in watched.items() if _is_over(drops[suite], budget)}
            tested += _test(choice, drops, budgets=over, delta=delta / len(candidates))
            cells += tested
            if not all(cell.certified for cell in tested):
                break
            certified.append(choice)
    return Walk(tuple(cells), tuple(certified), delta)


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
        measured = p_value(drops[suite], budget=budget.amount, delta=delta)
        bound = upper_bound(drops[suite], delta=delta)
        certified = measured.p <= delta
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
    return p_value(gained, budget=-budget.amount, delta=_WATCH_LEVEL).p <= _WATCH_LEVEL
