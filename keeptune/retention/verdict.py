"""A walk and what was chosen of it arrive; a verdict and its sentence in plain words leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keeptune.progress import noun
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


def verdict(
    walked: Walk, *, choice: Choice | None, left_out: Sequence[LeftOut] = (), one_model: bool = False
) -> Verdict:
    """Return the verdict on `choice`, or on the first steps of all paths where nothing was certified.

    Where suites are `left_out`, the first sentence says that nothing is certified for them. `one_model`: there was one
    model to test and no way to it, so that no alpha is named.

    The most promising candidate speaks for all: the one that fewest records would do for, which its hungriest suite
    decides.
    """
    first = f"{left_out_sentence(left_out)} " if left_out else ""
    if choice is not None:
        cells = [cell for cell in walked.cells if cell.choice == choice]
        model = _model(choice, one_model=one_model)
        sentence = _certified(cells, model=model, delta=walked.delta, other=bool(first))
        return Verdict("CERTIFIED", choice, None, None, first + sentence)
    firsts = _failures(walked)
    open_ = [cells for cells in firsts if all(cell.num_records_needed is not None for cell in cells)]
    if not open_:
        over = next(cell for cells in firsts for cell in cells if cell.num_records_needed is None)
        return Verdict("INFEASIBLE", None, over.suite, None, first + _infeasible(over, one_model=one_model))
    hungriest = min((max(cells, key=_needed) for cells in open_), key=_needed)
    sentence = _not_certified(hungriest, model=_model(hungriest.choice, one_model=one_model))
    return Verdict("NOT CERTIFIED", None, hungriest.suite, _needed(hungriest), first + sentence)


def left_out_sentence(left_out: Sequence[LeftOut]) -> str:
    """Return the sentence that says which suites nothing is certified for, and why."""
    nothing: dict[str, list[str]] = {}
    low, kept = [], []
    for one in left_out:
        if not _is_low(one):
            kept.append(f"{one.name} ({one.metric} {one.base:.3g})")
        elif one.base == 0 == one.chance:
            nothing.setdefault(one.metric, []).append(one.name)
        else:
            low.append(f"{one.name} ({one.metric} {one.base:.3g}, chance {one.chance:.3g})")
    parts = [(names, f"the base model has no {metric} to lose there") for metric, names in nothing.items()]
    parts += [(low, "the base model scores no better than chance there")] if low else []
    parts += [(kept, "the base model scores no more than the budget allows to lose there")] if kept else []
    return " ".join(f"Not certified for {', '.join(names)}: {why}." for names, why in parts)


def _is_low(one: LeftOut) -> bool:
    return one.reason == "chance"


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


def _model(choice: Choice, *, one_model: bool) -> str:
    return choice.candidate if one_model else f"{choice.candidate} at alpha {choice.alpha:g}"


def _certified(cells: Sequence[Cell], *, model: str, delta: float, other: bool) -> str:
    # The walk vouches for the budgets, all of them at once. A bound is tighter and holds for its suite taken alone.
    parts = [
        f"{cell.suite} loses at most {cell.budget.worded(cell.budget.amount)} "
        f"(measured {cell.measured.mean:.3g}, upper bound for this suite alone {_bound(cell)})"
        for cell in cells
    ]
    caps = {cell.budget.scale for cell in cells if cell.budget.unit == "nats"}
    cap = "".join(f" A record's change beyond {cap:g} {noun(cap, 'nats')} counts as that." for cap in caps)
    return (
        f"With {100 * (1 - delta):.4g} % confidence over the draw of records, {model} stays within "
        f"{'all other budgets' if other else 'every budget'}: {'; '.join(parts)}.{cap}"
    )


def _not_certified(cell: Cell, *, model: str) -> str:
    return (
        f"Not certified: {cell.measured.num_records:,} records of {cell.suite} are too few to show that "
        f"{model} loses less than {cell.budget.worded(cell.budget.amount)} (measured {cell.measured.mean:.3g}, upper "
        f"bound {_bound(cell)}). About {_needed(cell):,} records would be needed."
    )


def _infeasible(cell: Cell, *, one_model: bool) -> str:
    model = _model(cell.choice, one_model=one_model) + ("" if one_model else ", the smallest tested,")
    remedies = "" if one_model else "test smaller retention.alphas, "
    return (
        f"Infeasible: {model} lost {cell.budget.worded(cell.measured.mean)} on {cell.suite}, and the budget is "
        f"{cell.budget.worded(cell.budget.amount)}. More records would not change that: {remedies}raise the budget, or "
        "train with a lower learning rate or more replay."
    )
