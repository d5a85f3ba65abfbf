"""What the harness says of one document arrives; the document's values of its suite's metrics leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.errors import DataError
from keeptune.evaluation.labels import ANSWERED, GOLD, MAX_LABELS
from keeptune.evaluation.metrics import LABEL_METRICS

LABEL_AGGREGATIONS: Mapping[str, str] = {"matthews_corrcoef": "mcc", "f1": "binary_f1"}
"""The harness's aggregations of pairs of labels, and what keeptune calls the same."""
# The harness's own names for them, under which a document's pair stands.
_PAIRS = {"mcc": "mcc", "binary_f1": "f1"}


def values_of(sample: Mapping[str, Any], *, metrics: Sequence[str], where: str) -> dict[str, float]:
    """Return a document's own value of each metric; of metrics of labels, whether its label is right, and its labels.

    Raises:
        DataError: a value is no number between 0 and 1, or no pair of labels.
    """
    values: dict[str, float] = {}
    for metric in metrics:
        if metric in LABEL_METRICS:
            gold, answered = _labels(sample.get(_PAIRS[metric]), metric=metric, where=where)
            values |= {GOLD: gold, ANSWERED: answered, metric: float(gold == answered)}
        else:
            values[metric] = _share(sample.get(metric), metric=metric, where=where)
    return values


def _share(value: Any, *, metric: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise DataError(
            f"{where}: found {value!r} as {metric}; expected a number between 0 and 1 for each document. Name another "
            "task, or put another metric first in its file."
        )
    return number


def _labels(value: Any, *, metric: str, where: str) -> tuple[float, float]:
    """Return the numbers of a document's right label and of the one that was answered."""
    pair: Any = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
    if not all(label in range(MAX_LABELS) for label in pair):
        raise DataError(
            f"{where}: found {value!r} as {metric}; expected the right and the answered label, numbers from 0 to "
            f"{MAX_LABELS - 1}. Name another task."
        )
    return float(pair[0]), float(pair[1])
