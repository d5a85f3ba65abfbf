"""What a trial is, and which of several is best: results of trials arrive, their order leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Trial:
    """One training to be made, with its settings by dotted key.

    `number` counts the settings that were tried. `repeat` is 0, or which further seed the same settings are tried
    with. `share` is the part of the train records that it is trained on; with `num_records` it is so many of them, the
    first in an order that the seed decides.
    """

    number: int
    params: Mapping[str, Any]
    repeat: int = 0
    share: float = 1.0
    num_records: int | None = None

    @property
    def name(self) -> str:
        """The trial's name and that of its folder."""
        if self.num_records is not None:
            return f"records-{self.num_records}-seed-{self.repeat}"
        short = f"-short-{round(1 / self.share)}" if self.share < 1.0 else ""
        return f"trial-{self.number:04d}{short}" + (f"-seed-{self.repeat}" if self.repeat else "")

    @property
    def subset(self) -> str:
        """The name of the folder with its train records, which are the same for trials with the same name."""
        if self.num_records is not None:
            return f"data-{self.num_records}-of-seed-{self.repeat}"
        return "data" if self.share == 1.0 else f"data-{round(1 / self.share)}"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a trial: its value on validation, or the reason why it has none.

    `loss` is the validation loss of the same weights; it decides between equal values.
    `drift` is KL(base‖tuned) at its end in nats per token. `drops` is what each suite under a budget lost on its probe;
    `excess` is how far the worst of them is above its budget, as a share of it: 0 or less where all are kept.
    """

    trial: Trial
    state: Literal["finished", "failed"]
    value: float | None = None
    drift: float | None = None
    excess: float | None = None
    drops: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    reason: str = ""
    loss: float | None = None

    @property
    def feasible(self) -> bool:
        """Whether every budget is kept on the probe."""
        return is_within(self.excess)


def is_within(excess: float | None) -> bool:
    """Tell whether every budget is kept, by how far the worst suite is above its own; None: there is no budget."""
    return excess is None or excess <= 0.0


def ranked(results: Sequence[Result], *, higher_is_better: bool) -> list[Result]:
    """Return the finished trials, the best first: those that keep the budgets by value, then the others by excess.

    Of equal ones the lowest validation loss stands first, of equal losses the lowest number.
    """

    def order(result: Result) -> tuple[bool, float, float, float, int]:
        assert result.value is not None
        excess = 0.0 if result.feasible else result.excess or 0.0
        loss = math.inf if result.loss is None else result.loss
        return not result.feasible, excess, _cost(result.value, higher_is_better), loss, result.trial.number

    return sorted((result for result in results if result.value is not None), key=order)


def dominated(result: Result, others: Sequence[Result], *, higher_is_better: bool) -> bool:
    """Tell whether another trial is better in value and no worse in drift, or the other way round.

    A drift that was measured cannot be held against one that was not: neither trial dominates the other.
    """
    mine = _costs(result, higher_is_better)
    rivals = (_costs(other, higher_is_better) for other in others if other.value is not None)
    alike = (theirs for theirs in rivals if (theirs[1] is None) is (mine[1] is None))
    return any(theirs[0] <= mine[0] and (theirs[1] or 0.0) <= (mine[1] or 0.0) and theirs != mine for theirs in alike)


def front(results: Sequence[Result], *, higher_is_better: bool) -> list[Result]:
    """Return the finished trials that no other dominates in value and drift, in their order."""
    finished = [result for result in results if result.value is not None]
    return [r for r in finished if not dominated(r, finished, higher_is_better=higher_is_better)]


def _costs(result: Result, higher_is_better: bool, /) -> tuple[float, float | None]:
    value = math.inf if result.value is None else _cost(result.value, higher_is_better)
    return value, result.drift


def _cost(value: float, higher_is_better: bool, /) -> float:
    """Return the value as something that is better the lower it is; what is not finite is worst."""
    if not math.isfinite(value):
        return math.inf
    return -value if higher_is_better else value
