"""Simulated suites: what records lose is drawn, with a mean that is known."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from keeptune.retention.drops import Drops


def flips(rng: np.random.Generator, num: int, *, churn: float, mean: float) -> NDArray[np.float64]:
    """Return `num` values of 1, 0 or -1: a share `churn` is not 0, and they are `mean` in expectation."""
    drawn = rng.random(num)
    values = np.zeros(num)
    values[drawn < churn] = -1.0
    values[drawn < (churn + mean) / 2] = 1.0
    return values


def single(values: NDArray[np.float64] | list[float], scale: float = 1.0) -> Drops:
    """Return drops of records that are each a cluster of their own."""
    return Drops(np.asarray(values, dtype=np.float64), np.arange(len(values)), scale)


def grouped(rng: np.random.Generator, num_clusters: int, *, churn: float, mean: float) -> Drops:
    """Return accuracy-like drops in clusters of 1 to 4 records that all go the same way."""
    sizes = 1 + np.arange(num_clusters) % 4
    values = flips(rng, num_clusters, churn=churn, mean=mean)
    return Drops(np.repeat(values, sizes), np.repeat(np.arange(num_clusters), sizes))


def nats(rng: np.random.Generator, num: int, *, mean: float, spread: float) -> NDArray[np.float64]:
    """Return what documents lose in nats: skewed, as a few lose much."""
    return np.asarray(mean + spread * (rng.gamma(2.0, 1.0, size=num) - 2.0) / math.sqrt(2.0), dtype=np.float64)
