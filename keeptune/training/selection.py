"""Which step is best and when to stop: the validations so far arrive, the best of them leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.training.settings import Validation


@dataclass(frozen=True, slots=True)
class Selection:
    """The value that chooses: the validation loss, where lower is better, or a metric taken at the ends of epochs."""

    select_by: str
    higher_is_better: bool
    patience: int | None

    def value(self, validation: Validation) -> float | None:
        """Return the choosing value of a validation, None where it was not taken."""
        return validation.loss if self.select_by == "loss" else validation.metric

    def best(self, validations: Sequence[Validation]) -> Validation | None:
        """Return the validation with the best finite value, or None where there is none.

        Of equal values the one with the lowest validation loss is best, of equal losses the first.
        """
        best: Validation | None = None
        for validation in validations:
            if self._finite(validation) and (best is None or self._better(validation, best)):
                best = validation
        return best

    def ties(self, validations: Sequence[Validation]) -> list[Validation]:
        """Return the validations that share the best value."""
        best = self.best(validations)
        return [] if best is None else [v for v in validations if self.value(v) == self.value(best)]

    def moved(self, validations: Sequence[Validation]) -> bool:
        """Return whether a metric that chooses took different values; one value alone counts as moved."""
        taken = [self.value(validation) for validation in validations if self.value(validation) is not None]
        return self.select_by == "loss" or len(taken) < 2 or len(set(taken)) > 1

    def out_of_patience(self, validations: Sequence[Validation]) -> bool:
        """Return whether the last `patience` choosing values brought nothing better than those before."""
        taken = [validation for validation in validations if self.value(validation) is not None]
        if self.patience is None or not taken:
            return False
        best = self.best(taken)
        num_since = len(taken) if best is None else len(taken) - 1 - taken.index(best)
        return num_since >= self.patience

    def _finite(self, validation: Validation) -> bool:
        value = self.value(validation)
        return value is not None and math.isfinite(value)

    def _better(self, validation: Validation, other: Validation) -> bool:
        value, old = self.value(validation), self.value(other)
        assert value is not None and old is not None
        if value == old:
            return validation.loss < other.loss or (math.isfinite(validation.loss) and not math.isfinite(other.loss))
        return value > old if self.higher_is_better else value < old


def describe_ties(selection: Selection, validations: Sequence[Validation]) -> str:
    """Return in words that the metric left the choice of the best step to the validation loss; "" where it did not."""
    ties, best = selection.ties(validations), selection.best(validations)
    if best is None or len(ties) < 2 or selection.select_by == "loss":
        return ""
    metric, value = selection.select_by, selection.value(best)
    if not selection.moved(validations):
        return (
            f"{metric} was {value:.3f} at all {len(ties)} validations, so the validation loss chose step "
            f"{best.step:,}. Set evaluation.select_by to loss, or to a metric that gives credit for part of an answer, "
            "such as chrf."
        )
    steps = ", ".join(f"{validation.step:,}" for validation in ties)
    return f"{metric} was {value:.3f} at steps {steps}: of these, step {best.step:,} has the lowest validation loss."
