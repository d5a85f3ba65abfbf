"""MCC and F1 as functions of sums: a record's right and its answered label arrive, the score of added counts leaves.

Shape key: K labels, S = 2 K + 2 sums of a confusion.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

MAX_LABELS = 16
"""The most labels that a record may have."""
GOLD, ANSWERED = "gold_label", "answered_label"
"""Under these names a record's labels stand among its metrics, as numbers from 0."""


def confusion(metrics: Mapping[str, float]) -> tuple[float, ...]:
    """Return a record's summands: one-hot of the right and of the answered label (2 K), whether both agree, and 1."""
    gold, answered = int(metrics[GOLD]), int(metrics[ANSWERED])
    counts = [0.0] * (2 * MAX_LABELS + 2)
    counts[gold] = counts[MAX_LABELS + answered] = counts[-1] = 1.0
    counts[-2] = float(gold == answered)
    return tuple(counts)


def mcc(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Matthews' correlation of right and answered labels, from sums (..., S); 0 where either is always the same.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient", as sklearn's
    `matthews_corrcoef` computes it.
    """
    gold, answered = sums[..., :MAX_LABELS], sums[..., MAX_LABELS : 2 * MAX_LABELS]
    right, number = sums[..., -2], sums[..., -1]
    covariance = right * number - (gold * answered).sum(axis=-1)
    variances = (np.square(number) - np.square(gold).sum(axis=-1)) * (
        np.square(number) - np.square(answered).sum(axis=-1)
    )
    return np.where(variances > 0, covariance / np.sqrt(np.where(variances > 0, variances, 1.0)), 0.0)


def detection(metrics: Mapping[str, float]) -> tuple[float, ...]:
    """Return a record's summands of F1: whether label 1 is right and answered, is right, and is answered."""
    gold, answered = metrics[GOLD] == 1.0, metrics[ANSWERED] == 1.0
    return (float(gold and answered), float(gold), float(answered))


def binary_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the F1 of label 1 from (..., 3); 0 where it is neither right nor answered anywhere.

    2PR / (P + R) with P = both / answered and R = both / right is 2 both / (right + answered).
    """
    both, either = sums[..., 0], sums[..., 1] + sums[..., 2]
    return np.where(either > 0, 2.0 * both / np.where(either > 0, either, 1.0), 0.0)
