"""How often keeptune's 95 % intervals hold the true value, and whether one has no width.

    python benchmarks/intervals.py [--repetitions 2000] [--jobs 1]

Each cell draws records of one kind, whose true value is known, and makes the interval as the program does. It writes
results/intervals.json and .md; shares below .92 are bold. Shape key: R records, G clusters, K tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from keeptune.evaluation import corpus, intervals
from keeptune.evaluation.intervals import Ends, Spread, spread_of
from keeptune.evaluation.metrics import METRICS

SIZES = (20, 50, 100, 300, 1000)
RESULTS = Path(__file__).with_name("results")
GOAL = 0.92
# The correlation of two records of a cluster before they become values; of the values it is less.
CORRELATION = 0.5
Draw = Callable[[np.random.Generator, int], tuple[Ends, float]]
Values = Callable[[NDArray[np.float64]], NDArray[np.float64]]
GRID_R = (np.arange(200_000) + 0.5) / 200_000


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of record, the number of clusters, the share of intervals that hold the truth, and their mean width.

    `none` is the share without an interval, where all clusters agree and the metric has no bounds.
    """

    kind: str
    num_clusters: int
    coverage: float
    width: float
    none: float
    no_width: int


def uniform(rng: np.random.Generator, num: int, largest: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return uniform numbers (R,), correlated within clusters of 1 to `largest` records, and the sizes (G,)."""
    sizes_G = rng.integers(1, largest + 1, size=num)
    shared_R = np.repeat(rng.normal(size=num), sizes_G)
    own_R = rng.normal(size=len(shared_R))
    return ndtr(math.sqrt(CORRELATION) * shared_R + math.sqrt(1 - CORRELATION) * own_R), sizes_G


def mean_of(
    values_R: NDArray[np.float64],
    sizes_G: NDArray[np.int64],
    weights_R: NDArray[np.float64],
    *,
    combine: Values = METRICS["loss"].combine,
) -> Spread:
    """Return the spread of a weighted mean, or of its exponential."""
    starts_G = np.concatenate([[0], np.cumsum(sizes_G)[:-1]])
    sums_GS = np.add.reduceat(np.stack([values_R * weights_R, weights_R], axis=1), starts_G)
    return spread_of(sums_GS, combine, sizes_G=sizes_G)


def ones(values_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return equal weights."""
    return np.ones(len(values_R))


def score(values: Values, *, largest: int = 1, binary: bool = False) -> Draw:
    """Return a draw of a score in [0, 1]."""
    truth = float(values(GRID_R).mean())

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        uniform_R, sizes_G = uniform(rng, num, largest)
        spread = mean_of(values(uniform_R), sizes_G, ones(uniform_R))
        return intervals.score_interval(spread, bounds=(0.0, 1.0), binary=binary), truth

    return draw


def paired(values: Values, *, largest: int = 1, binary: bool = False, confidence: float = 0.95) -> Draw:
    """Return a draw of a paired difference in [-1, 1]."""
    truth = float(values(GRID_R).mean())

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        return paired_interval(rng, num, values, largest=largest, binary=binary, confidence=confidence)[0], truth

    return draw


def paired_interval(
    rng: np.random.Generator, num: int, values: Values, *, largest: int, binary: bool, confidence: float
) -> tuple[Ends, float]:
    """Return the interval of one paired difference, and the difference."""
    uniform_R, sizes_G = uniform(rng, num, largest)
    values_R = values(uniform_R)
    spread = mean_of(values_R, sizes_G, ones(values_R))
    if binary:
        changed = np.count_nonzero(values_R) / len(values_R)
        return intervals.binary_difference_interval(spread, changed=changed, confidence=confidence), spread.value
    return intervals.difference_interval(spread, bounds=(-1.0, 1.0), confidence=confidence), spread.value


def losses(values: Values, change: Values, *, of: str, largest: int = 1) -> Draw:
    """Return a draw of a loss or perplexity, or with `of` "paired …" of its change, over 1 to 40 tokens a record."""
    before, after = float(values(GRID_R).mean()), float(values(GRID_R).mean() + change(GRID_R).mean())
    truths = {"loss": before, "perplexity": math.exp(before)}
    truths |= {"paired loss": after - before, "paired perplexity": math.exp(after) - math.exp(before)}

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        uniform_R, sizes_G = uniform(rng, num, largest)
        tokens_R = rng.integers(1, 41, size=len(uniform_R)).astype(np.float64)
        moved_R = change(rng.random(len(uniform_R)))
        before_R, after_R = values(uniform_R), values(uniform_R) + moved_R
        metric = METRICS[of.removeprefix("paired ")]
        theirs, mine = (
            mean_of(values_R, sizes_G, tokens_R, combine=metric.combine) for values_R in (before_R, after_R)
        )
        if of.startswith("paired "):
            bounds = intervals.difference_bounds(metric.bounds)
            return intervals.difference_interval(mine.less(theirs), bounds=bounds), truths[of]
        loss = mean_of(before_R, sizes_G, tokens_R)
        ends = intervals.score_interval(loss, bounds=METRICS["loss"].bounds, binary=False)
        return (ends if of == "loss" else intervals.exponential(ends)), truths[of]

    return draw


@cache
def texts(
    metric: str, changed: float, largest: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return what two models' answers count (G, S) in a corpus metric over 1,500 clusters, and the sizes (G,).

    A share of the words, about `changed`, is another than in the reference; the second model changes fewer.
    """
    rng = np.random.default_rng(zlib.crc32(f"{metric}/{changed}/{largest}".encode()))
    words = np.array(["".join(rng.choice(list("abcdefghilmnoprstuv"), rng.integers(2, 9))) for _ in range(2000)])
    chances = 1.0 / np.arange(1, 2001)
    chances /= chances.sum()

    def spoilt(reference: NDArray[np.str_], share: float) -> str:
        others = rng.choice(words, len(reference), p=chances)
        return " ".join(np.where(rng.random(len(reference)) < share, others, reference))

    sides, sizes_G = ([], []), rng.integers(1, largest + 1, size=1500)
    for size in sizes_G:
        share = rng.beta(4 * changed, 4 * (1 - changed))
        references = [rng.choice(words, rng.integers(3, 22), p=chances) for _ in range(size)]
        for side, part in zip(sides, (1.0, 0.7), strict=True):
            rows = [corpus.counts(spoilt(r, part * share), [" ".join(r)], name=metric) for r in references]
            side.append(np.sum(rows, axis=0))
    return np.array(sides[0]), np.array(sides[1]), sizes_G


def corpus_score(metric: str, changed: float, *, is_paired: bool, largest: int = 1) -> Draw:
    """Return a draw of clusters of texts in a corpus metric, or of the difference of two models' answers to them."""

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        theirs_GS, mine_GS, sizes_G = texts(metric, changed, largest)
        combine, chosen = METRICS[metric].combine, rng.integers(len(sizes_G), size=num)
        of, bounds = partial(spread_of, combine=combine, sizes_G=sizes_G[chosen]), METRICS[metric].bounds
        theirs, truth = of(theirs_GS[chosen]), float(combine(theirs_GS.sum(axis=0)))
        if not is_paired:
            return intervals.score_interval(theirs, bounds=bounds, binary=False), truth
        apart = of(mine_GS[chosen]).less(theirs)
        better = float(combine(mine_GS.sum(axis=0)))
        return intervals.difference_interval(apart, bounds=intervals.difference_bounds(bounds)), better - truth

    return draw


def worst_of(num_tasks: int, values: Sequence[Values], *, binary: bool) -> Draw:
    """Return a draw of tasks, of which the one that lost most is picked with its interval; values go round."""
    truths = [float(one(GRID_R).mean()) for one in values]
    confidence = intervals.confidence_of_each(num_tasks)

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        found = [
            paired_interval(rng, num, values[k % len(values)], largest=1, binary=binary, confidence=confidence)
            for k in range(num_tasks)
        ]
        worst = min(range(num_tasks), key=lambda k: found[k][1])
        return found[worst][0], truths[worst % len(values)]

    return draw


def few_shot(num_draws: int, *, apart: bool) -> Draw:
    """Return a draw of choices of examples with a standard deviation of .05, or of a tuned model's gain over them."""

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        ease_R, sizes_G = rng.normal(size=num), np.ones(num, dtype=np.int64)
        right_R = (rng.normal(size=num) + ease_R < ndtri(0.6) * math.sqrt(2)).astype(np.float64)
        spreads = []
        for _ in range(num_draws):
            share = min(max(0.5 + 0.05 * rng.normal(), 0.01), 0.99)
            shown_R = (rng.normal(size=num) + ease_R < ndtri(share) * math.sqrt(2)).astype(np.float64)
            values_R = right_R - shown_R if apart else shown_R
            spreads.append(mean_of(values_R, sizes_G, ones(values_R)))
        means, errors = zip(*((s.value, s.standard_error) for s in spreads), strict=True)
        bounds = (-1.0, 1.0) if apart else (0.0, 1.0)
        ends = intervals.mean_of_draws(means, errors, bounds=bounds, num_clusters=num)
        return ends, 0.6 - 0.5 if apart else 0.5

    return draw


def mean_of_tasks(shares: Sequence[float]) -> Draw:
    """Return a draw of the mean over tasks of exact match."""

    def draw(rng: np.random.Generator, num: int) -> tuple[Ends, float]:
        found = []
        for share in shares:
            uniform_R, sizes_G = uniform(rng, num, 1)
            found.append(mean_of((uniform_R < share).astype(np.float64), sizes_G, ones(uniform_R)))
        ends = [intervals.score_interval(one, bounds=(0.0, 1.0), binary=True) for one in found]
        values, errors = [one.value for one in found], [one.standard_error for one in found]
        return intervals.mean_of_tasks(values, errors, ends, bounds=(0.0, 1.0)), float(np.mean(shares))

    return draw


def exact(share: float) -> Values:
    """Return 1 for a share of the records, else 0."""
    return lambda u: (u < share).astype(np.float64)


def flips(lost: float, gained: float) -> Values:
    """Return -1 for the share that is lost, 1 for the share that is gained, else 0."""
    return lambda u: np.where(u < lost, -1.0, np.where(u > 1 - gained, 1.0, 0.0))


def within(low: float, high: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far each number is between two others."""
    return np.clip((u - low) / (high - low), 0.0, 1.0)


def logarithmic(sigma: float, mean: float) -> Values:
    """Return log-normal values."""
    return lambda u: mean * np.exp(sigma * ndtri(u) - sigma**2 / 2)


ROUGE: dict[str, Values] = {
    "skewed": lambda u: u**3,
    "many 0 and 1": lambda u: within(0.25, 0.9, u) ** 1.5,
    "in fifths": lambda u: np.round(5 * u**0.3) / 5,
    "5 % not 1": lambda u: within(0.0, 0.05, u),
    "10 % not 0": lambda u: within(0.9, 1.0, u),
}
PAIRED: dict[str, Values] = {
    "all moved": lambda u: 0.2 * ndtri(u).clip(-4, 4) - 0.05,
    "30 % moved": lambda u: -(within(0.0, 0.2, u) - 1) * -0.8 + 0.6 * within(0.9, 1.0, u),
    "10 % lost": lambda u: within(0.0, 0.1, u) - 1,
    "5 % lost": lambda u: within(0.0, 0.05, u) - 1,
    "none moved": lambda u: 0.0 * u,
}
LOSS = {"light": (0.35, 1.5), "heavy": (0.8, 1.5)}
CHANGE: dict[str, Values] = {
    "light": lambda u: 0.2 * ndtri(u) - 0.1,
    "heavy": lambda u: 0.15 * stdtrit(3, u) - 0.1,
    "skewed": lambda u: logarithmic(1.0, 0.2)(u) - 0.1,
}
TEXTS = {"low": 0.6, "middling": 0.4, "high": 0.15}
LARGEST_OF_TEXTS = 5


@cache
def kinds() -> dict[str, Draw]:
    """Return every kind of record."""
    found: dict[str, Draw] = {}
    for largest in (1, 5, 20):
        of = "" if largest == 1 else f", clusters of 1 to {largest}"
        drawn = {**kinds_of_means(largest), **kinds_of_losses(largest), **kinds_of_texts(largest)}
        found |= {f"{name}{of}": draw for name, draw in drawn.items()}
    return {**found, **kinds_of_several()}


def kinds_of_means(largest: int) -> dict[str, Draw]:
    """Return exact match and values between 0 and 1, and differences of these."""
    found: dict[str, Draw] = {}
    for share in (0.02, 0.05, 0.1, 0.5, 0.9, 0.95, 0.98):
        found[f"exact match {share:g}"] = score(exact(share), largest=largest, binary=True)
    for lost, gained in ((0.02, 0.0), (0.05, 0.0), (0.1, 0.0), (0.05, 0.02), (0.1, 0.1), (0.0, 0.0)):
        name = f"paired exact match, {100 * lost:g} % lost, {100 * gained:g} % gained"
        found[name] = paired(flips(lost, gained), largest=largest, binary=True)
    found |= {f"ROUGE-like, {name}": score(values, largest=largest) for name, values in ROUGE.items()}
    return found | {f"paired ROUGE-like, {name}": paired(values, largest=largest) for name, values in PAIRED.items()}


def kinds_of_losses(largest: int) -> dict[str, Draw]:
    """Return losses, perplexities and differences of these."""
    found: dict[str, Draw] = {}
    light, heavy = (logarithmic(*LOSS[tail]) for tail in ("light", "heavy"))
    for name in ("loss", "perplexity"):
        for tail, law in (("light", light), ("heavy", heavy)):
            found[f"{name}, {tail} tail"] = losses(law, CHANGE["light"], of=name, largest=largest)
        for tail, change in CHANGE.items():
            found[f"paired {name}, {tail} change"] = losses(light, change, of=f"paired {name}", largest=largest)
    name = "paired perplexity, heavy tail, light change"
    return found | {name: losses(heavy, CHANGE["light"], of="paired perplexity", largest=largest)}


def kinds_of_texts(largest: int) -> dict[str, Draw]:
    """Return corpus BLEU and chrF, and differences of these."""
    found: dict[str, Draw] = {}
    for name, level, is_paired in product(("bleu", "chrf"), TEXTS, (False, True)):
        label = f"{'paired ' if is_paired else ''}{name}, {level}"
        found[label] = corpus_score(name, TEXTS[level], is_paired=is_paired, largest=largest)
    return found if largest <= LARGEST_OF_TEXTS else {}


def kinds_of_several() -> dict[str, Draw]:
    """Return the worst of several tasks, means of several, and several draws of examples."""
    found: dict[str, Draw] = {}
    equal, unequal = [flips(0.1, 0.1)], [flips(0.1, 0.1), flips(0.05, 0.0), flips(0.15, 0.05)]
    for num in (5, 11, 30):
        found[f"worst of {num}, exact match, equal"] = worst_of(num, equal, binary=True)
        found[f"worst of {num}, exact match, unequal"] = worst_of(num, unequal, binary=True)
        found[f"worst of {num}, ROUGE-like"] = worst_of(num, [PAIRED["30 % moved"]], binary=False)
    for num in (3, 5):
        found[f"few-shot, {num} draws"] = few_shot(num, apart=False)
        found[f"paired with few-shot, {num} draws"] = few_shot(num, apart=True)
    found["mean of exact match .98, .5 and .9"] = mean_of_tasks((0.98, 0.5, 0.9))
    found["mean of 5 tasks of exact match .5"] = mean_of_tasks((0.5,) * 5)
    return found | {"mean of 10 tasks of exact match .98": mean_of_tasks((0.98,) * 10)}


def measure(place: tuple[str, int], *, repetitions: int) -> Cell:
    """Draw records of a kind and size and count the intervals that hold the truth; the name seeds the draws."""
    name, num = place
    rng, draw = np.random.default_rng(zlib.crc32(f"{name}/{num}".encode())), kinds()[name]
    held, widths, none = 0, [], 0
    for _ in range(repetitions):
        (low, high), truth = draw(rng, num)
        if low is None or high is None:
            none += 1
            continue
        # The truth of a mean of equal numbers is off by rounding.
        held += low - 1e-9 <= truth <= high + 1e-9
        widths.append(high - low)
    made = max(1, repetitions - none)
    no_width = sum(width <= 0.0 for width in widths)
    return Cell(name, num, held / made, float(np.mean(widths)) if widths else 0.0, none / repetitions, no_width)


def table(cells: Sequence[Cell]) -> str:
    """Return each kind's coverage by size as a Markdown table; what is below the goal is bold."""
    lines = [f"| records | {' | '.join(f'{num:,}' for num in SIZES)} |", f"|---|{'---|' * len(SIZES)}"]
    for kind in dict.fromkeys(cell.kind for cell in cells):
        own = [f"{c.coverage:.3f}" if c.coverage >= GOAL else f"**{c.coverage:.3f}**" for c in cells if c.kind == kind]
        lines.append(f"| {kind} | {' | '.join(own)} |")
    return "\n".join(lines)


def family(kind: str) -> str:
    """Return what a kind is of, and in which clusters: "exact match", "paired loss, clusters of 1 to 5"."""
    first, _, clusters = kind.partition(", clusters")
    return re.split(r",| [.\d]", first)[0] + (f", clusters{clusters}" if clusters else "")


def worst_table(cells: Sequence[Cell]) -> str:
    """Return the least coverage in each family by size as a Markdown table."""
    least: dict[tuple[str, int], Cell] = {}
    for cell in sorted(cells, key=lambda cell: -cell.coverage):
        least[family(cell.kind), cell.num_clusters] = cell
    names = dict.fromkeys(family(cell.kind) for cell in cells)
    return table([replace(least[name, num], kind=name) for name in names for num in SIZES])


def write(cells: Sequence[Cell], *, repetitions: int) -> str:
    """Write all cells; return what came of them in words."""
    low, bad = ([cell for cell in cells if cell.coverage < goal] for goal in (GOAL, 0.9))
    num_flat = sum(cell.no_width for cell in cells)
    words = (
        f"{len(cells)} cells of {repetitions:,} draws: {len(low)} hold the truth in less than {GOAL:.0%} (bold), "
        f"{len(bad)} in less than 90 %; {num_flat} intervals have no width. The sizes are numbers of clusters."
    )
    text = f"{words}\n\nThe least of each kind:\n\n{worst_table(cells)}\n\nEvery cell:\n\n{table(cells)}\n"
    (RESULTS / "intervals.md").write_text(text, encoding="utf-8")
    value = {"repetitions": repetitions, "goal": GOAL, "cells": [asdict(cell) for cell in cells]}
    (RESULTS / "intervals.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return "\n".join([words, *(f"{cell.kind}, {cell.num_clusters}: {cell.coverage:.3f}" for cell in low)])


def main() -> None:
    """Measure all cells and write them: about 15 minutes on one core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    places = [(name, num) for name in kinds() for num in SIZES]
    with ProcessPoolExecutor(given.jobs) as pool:
        cells = list(pool.map(partial(measure, repetitions=given.repetitions), places, chunksize=len(SIZES)))
    print(write(cells, repetitions=given.repetitions))


if __name__ == "__main__":
    main()
