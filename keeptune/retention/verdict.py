"""A walk and what was chosen of it arrive; a verdict and its sentence in plain words leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keeptune.retention.chance import LeftOut
from keeptune.retention.walk import Cell, Choice, Walk


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the certify records allow to be said.

    `num_records_needed` and `suite` say which suite asks for most records, and how many, where nothing is certified;
    `suite` alone is the one over its budget where no number of records would do.
    """

    kind: Literal["CERTIFIED", "NOT CERTIFIED", "INFEASIBLE"]
    choice: Choice | None
    suite: str | None
    num_records_needed: int | None
    sentence: str


def verdict(walked: Walk, *, choice: Choice | None, left_out: Sequence[LeftOut] = ()) -> Verdict:
    """Return the verdict on `choice`, or on the first steps of all paths where nothing was certified.

    Where suites are `left_out`, the first sentence says that nothing is certified for them.

    The most promising candidate speaks for all: the one that fewest records would do for, which its hungriest suite
    decides.
    """
    first = f"{left_out_sentence(left_out)} " if left_out else ""
    if choice is not None:
        cells = [cell for cell in walked.cells if cell.choice == choice]
        return Verdict(
            "CERTIFIED", choice, None, None, first + _certified(cells, delta=walked.delta, other=bool(first))
        )
    firsts = _failures(walked)
    open_ = [cells for cells in firsts if all(cell.num_records_needed is not None for cell in cells)]
    if not open_:
        over = next(cell for cells in firsts for cell in cells if cell.num_records_needed is None)
        return Verdict("INFEASIBLE", None, over.suite, None, first + _infeasible(over))
    hungriest = min((max(cells, key=_needed) for cells in open_), key=_needed)
    return Verdict("NOT CERTIFIED", None, hungriest.suite, _needed(hungriest), first + _not_certified(hungriest))


def left_out_sentence(left_out: Sequence[LeftOut]) -> str:
    """Return the sentence that says which suites nothing is certified for, and why."""
    parts = [f"{one.name} ({one.metric} {one.base:.3g}, chance {one.chance:.3g})" for one in left_out]
    return f"Not certified for {', '.join(parts)}: the base model scores no better than chance there."


def _failures(walked: Walk) -> list[list[Cell]]:
    """Return each candidate's failed tests; where nothing is certified, all are of its first alpha."""
    failures: dict[str, list[Cell]] = {}
    for cell in walked.cells:
        if not cell.certified:
            failures.setdefault(cell.choice.candidate, []).append(cell)
    return list(failures.values())


def _needed(cell: Cell) -> int:
    return cell.num_records_needed or 0


def _bound(cell: Cell) -> str:
    return "none" if cell.upper_bound is None else f"{cell.upper_bound:.3g}"


def _certified(cells: Sequence[Cell], *, delta: float, other: bool) -> str:
    # The walk vouches for the budgets, all of them at once. A bound is tighter and holds for its suite taken alone.
    choice = cells[0].choice
    parts = [
        f"{cell.suite} loses at most {cell.budget.worded(cell.budget.amount)} "
        f"(measured {cell.measured.mean:.3g}, bound on its own {_bound(cell)})"
        for cell in cells
    ]
    return (
        f"With {100 * (1 - delta):.4g} % confidence over the draw of records, {choice.candidate} at alpha "
        f"{choice.alpha:g} keeps every {'other ' if other else ''}budget: {'; '.join(parts)}."
    )


def _not_certified(cell: Cell) -> str:
    return (
        f"Not certified: {cell.measured.num_records:,} records of {cell.suite} are too few to show that "
        f"{cell.choice.candidate} at alpha {cell.choice.alpha:g} loses less than "
        f"{cell.budget.worded(cell.budget.amount)} (measured {cell.measured.mean:.3g}, bound {_bound(cell)}). About "
        f"{_needed(cell):,} records would be needed."
    )


def _infeasible(cell: Cell) -> str:
    return (
        f"Infeasible: {cell.choice.candidate} at alpha {cell.choice.alpha:g}, the smallest tested, lost "
        f"{cell.measured.mean:.3g} on {cell.suite}, and the budget is {cell.budget.worded(cell.budget.amount)}. More "
        "records would not change that: raise the budget, or train with a lower learning rate or more replay."
    )
