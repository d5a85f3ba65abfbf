"""Simulated suites: what records lose is drawn, with a mean that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keeptune.retention.drops import Drops


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of suite: `draw` returns what `num` records lose; their mean is `mean` in expectation."""

    draw: Callable[[np.random.Generator, int], Drops]
    mean: float


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


def exact_match(*, churn: float, mean: float) -> Kind:
    """Return records of a metric of 0 or 1, of which a share `churn` changes."""
    return Kind(lambda rng, num: single(flips(rng, num, churn=churn, mean=mean)), mean)


def rare_losses(*, share: float, gain: float) -> Kind:
    """Return records of which a share loses all and the others gain up to `gain`."""

    def draw(rng: np.random.Generator, num: int) -> Drops:
        return single(np.where(rng.random(num) < share, 1.0, -gain * rng.random(num)))

    return Kind(draw, share - (1.0 - share) * gain / 2.0)


def rouge_like(*, share: float) -> Kind:
    """Return graded scores: a share loses .3 to 1, the others move by a tenth about 0."""

    def draw(rng: np.random.Generator, num: int) -> Drops:
        lost = rng.random(num) < share
        return single(np.where(lost, rng.uniform(0.3, 1.0, num), np.clip(rng.normal(0.0, 0.1, num), -1.0, 1.0)))

    return Kind(draw, 0.65 * share)


def tied(*, unchanged: float) -> Kind:
    """Return graded scores of few values, as of short answers, of which most do not change."""
    values = np.array([-1.0, -0.5, -1 / 3, 1 / 3, 0.5, 1.0, 0.0])
    chances = np.array([*((1.0 - unchanged) * np.array([0.1, 0.1, 0.1, 0.25, 0.25, 0.2])), unchanged])

    def draw(rng: np.random.Generator, num: int) -> Drops:
        return single(rng.choice(values, size=num, p=chances))

    return Kind(draw, float(values @ chances))


def capped_lognormal(*, sigma: float, cap: float) -> Kind:
    """Return losses in nats with a heavy tail, exp(sigma z) / 20, of which more than `cap` counts as `cap`."""

    def losses(normal: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.minimum(np.exp(sigma * normal) / 20.0, cap)

    # The mean by quadrature: the chance of each of many slices of a normal variable.
    edges = np.linspace(-8.0, 8.0, 400_001)
    middles = (edges[1:] + edges[:-1]) / 2.0
    density = np.exp(-np.square(middles) / 2.0)
    mean = float(losses(middles) @ density / density.sum())
    return Kind(lambda rng, num: single(losses(rng.standard_normal(num)), scale=cap), mean)


def rare_nats(*, share: float, noise: float) -> Kind:
    """Return losses in nats: a share loses 5 nats, which count as 1; the others move by `noise` about 0."""

    def draw(rng: np.random.Generator, num: int) -> Drops:
        return single(np.where(rng.random(num) < share, 1.0, np.clip(rng.normal(0.0, noise, num), -1.0, 1.0)))

    return Kind(draw, share)


def two_sizes(*, mean: float) -> Kind:
    """Return single records and pairs, a fifth of which are pairs; pairs are lost alone."""

    def draw(rng: np.random.Generator, num: int) -> Drops:
        paired = rng.random(num) < 0.2
        sizes = np.where(paired, 2, 1)
        # Of 1.2 records a cluster, 0.4 stand in pairs.
        values = (paired & (rng.random(num) < 3.0 * mean)).astype(np.float64)
        return Drops(np.repeat(values, sizes), np.repeat(np.arange(num), sizes))

    return Kind(draw, mean)


def rare_in_one_task(*, num: int, share: float) -> Kind:
    """Return records of `num` tasks alike in size, of which one bears all losses, and some records gain a little."""

    def draw(rng: np.random.Generator, num_records: int) -> Drops:
        strata = np.arange(num_records) % num
        lost = (strata == 0) & (rng.random(num_records) < share * num_records / np.count_nonzero(strata == 0))
        gained = np.where(rng.random(num_records) < 0.01, -0.1 * rng.random(num_records), 0.0)
        return Drops(np.where(lost, 1.0, gained), np.arange(num_records), strata_R=strata)

    # Records that are lost do not gain.
    return Kind(draw, share - 0.01 * 0.05 * (1.0 - share))


def clustered(*, largest: int, churn: float, mean: float) -> Kind:
    """Return accuracy-like clusters of 1 to `largest` records that go the same way; large ones change more often."""

    def draw(rng: np.random.Generator, num: int) -> Drops:
        sizes = rng.integers(1, largest + 1, num)
        # The mean over records weighs a cluster by its size; what is lost and gained in excess grows alike with it.
        more = sizes / (np.square(np.arange(1.0, largest + 1)).sum() / np.arange(1.0, largest + 1).sum())
        drawn = rng.random(num)
        lost, changed = (churn + mean) / 2.0 * more, churn * more
        values = np.where(drawn < lost, 1.0, np.where(drawn < changed, -1.0, 0.0))
        return Drops(np.repeat(values, sizes), np.repeat(np.arange(num), sizes))

    return Kind(draw, mean)


def tasks(*, num: int, spread: float, churn: float, mean: float) -> Kind:
    """Return accuracy-like records of `num` tasks alike in size, whose means lie up to `spread` about `mean`."""
    rising = np.linspace(-spread, spread, num)
    # The lowest, the highest, the next ones: whichever tasks have a record more, the mean over records stays.
    means = mean + np.stack([rising, rising[::-1]], axis=1).ravel()[:num]

    def draw(rng: np.random.Generator, num_records: int) -> Drops:
        parts = np.array_split(np.arange(num_records), num)
        values = [flips(rng, len(p), churn=max(churn, abs(m)), mean=m) for p, m in zip(parts, means, strict=True)]
        strata = np.repeat(np.arange(num), [len(part) for part in parts])
        return Drops(np.concatenate(values), np.arange(num_records), strata_R=strata)

    return Kind(draw, mean)


KINDS: Mapping[str, Kind] = {
    **{
        f"exact match, {mean:g} lost, {churn:g} changed": exact_match(churn=churn, mean=mean)
        for mean, churn in (
            (0.01, 0.01), (0.01, 0.03), (0.02, 0.02), (0.02, 0.06), (0.02, 0.3), (0.05, 0.05), (0.05, 0.15), (0.1, 0.3)
        )
    },
    **{
        f"{share:g} lose all, the rest gain up to {gain:g}": rare_losses(share=share, gain=gain)
        for share, gain in ((0.01, 0.01), (0.03, 0.02), (0.06, 0.02), (0.06, 0.1), (0.2, 0.1))
    },
    **{f"graded, {share:g} lose .3 to 1": rouge_like(share=share) for share in (0.02, 0.1, 0.3)},
    **{f"graded with ties, {same:g} unchanged": tied(unchanged=same) for same in (0.5, 0.85, 0.95)},
    **{
        f"lognormal nats, sigma {sigma:g}, cap {cap:g}": capped_lognormal(sigma=sigma, cap=cap)
        for sigma, cap in ((0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (2.0, 5.0))
    },
    **{
        f"nats, {share:g} lose 5, noise {noise:g}": rare_nats(share=share, noise=noise)
        for share, noise in ((0.01, 0.0), (0.01, 0.005), (0.01, 0.05), (0.03, 0.05))
    },
    **{
        f"clusters of 1 to {largest}, {mean:g} lost": clustered(largest=largest, churn=0.1, mean=mean)
        for largest, mean in ((4, 0.02), (50, 0.02), (4, 0.05))
    },
    "single records and pairs, .02 lost in pairs": two_sizes(mean=0.02),
    **{
        f"{num} tasks, {share:g} lost in one, isolated gains": rare_in_one_task(num=num, share=share)
        for num, share in ((2, 0.01), (4, 0.02))
    },
    **{
        f"{num} tasks, means {spread:g} about .1": tasks(num=num, spread=spread, churn=0.3, mean=0.1)
        for num, spread in ((4, 0.2), (10, 0.2), (30, 0.1))
    },
}  # fmt: skip
