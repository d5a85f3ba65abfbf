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
        """Return the validation with the best finite value, the first of equals, or None where there is none."""
        best: Validation | None = None
        for validation in validations:
            if self._finite(validation) and (best is None or self._better(validation, best)):
                best = validation
        return best

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
        return value > old if self.higher_is_better else value < old
