"""A suite's answers of the base model arrive; what chance scores there, and whether a test tells the two apart, leaves.

Chance is always giving the most frequent answer, or guessing among the choices that are offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.special import stdtr

from keeptune.evaluation.labels import ANSWERED, GOLD
from keeptune.evaluation.metrics import LABEL_METRICS, METRICS, Answer, metric_of
from keeptune.evaluation.scores import difference, score_of
from keeptune.retention.drops import metric_scale

# With so few distinct references a task is a choice among labels, and always naming one of them scores something.
_MAX_LABELS = 20
# A base that is this share of the scale above chance has something to lose, however few records show it.
_LEAST_ABOVE = 0.1
_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Chance:
    """What the base scores on a suite in one metric, what chance scores (`level`), and whether the base is `above` it.

    A base that no test tells from chance is not above it. `clearly` above it, by a tenth of the metric's scale, a share
    of what was kept means something. A metric that is better where it is lower has no chance level: then `level` is 0,
    and the base is always above it.
    """

    base: float
    level: float
    above: bool
    clearly: bool


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A suite that no certificate speaks of, since there the base has nothing to lose in the metric of its `budget`.

    `reason`: it is no better than chance, or scores no more than the budget allows to lose. `budget` is the name that
    the recipe's budget has: the suite's own, or "others" where it is one of them. `name` is the suite's, told apart
    from the same suite under a budget of its own.
    """

    name: str
    suite: str
    budget: str
    metric: str
    base: float
    chance: float
    reason: Literal["chance", "budget"] = "chance"


def chance_of(base: Sequence[Answer], *, metric: str, least: float = 0.0, level: float = _LEVEL) -> Chance:
    """Judge whether the base is better than chance at these answers in `metric`; `least` is what guessing scores.

    Where the references are 2 to 20 labels, chance is what always giving the most frequent one scores, or `least` where
    that is more. Any score is above a chance of 0. Above another, the base is where a one-sided t test at `level`,
    paired and clustered by input, says so, and wherever it is a tenth of the metric's scale higher. Answers that are a
    single cluster allow no test, and count as above.
    """
    score = score_of(base, metric=metric)
    if not metric_of(metric).higher_is_better:
        return Chance(score, 0.0, above=True, clearly=False)
    guesses = [*_guesses(base, metric=metric, least=least)]
    chance = max((score_of(guessed, metric=metric) for guessed in guesses), default=0.0)
    clearly = score - chance >= _LEAST_ABOVE * metric_scale(metric)
    told = score > 0.0 and all(_is_better(base, guessed, metric=metric, level=level) for guessed in guesses)
    return Chance(score, chance, above=clearly or told, clearly=clearly)


def _guesses(base: Sequence[Answer], *, metric: str, least: float) -> Iterator[list[Answer]]:
    """Yield what whoever knows nothing would answer: the most frequent label, or a choice by lot."""
    if metric in LABEL_METRICS:
        yield _one_label(base, metric)
        return
    times = Counter(reference for answer in base for reference in set(answer.references))
    if 2 <= len(times) <= _MAX_LABELS:
        label = max(times, key=lambda reference: times[reference])
        value = METRICS[metric].value if metric in METRICS else None
        yield [
            replace(
                answer,
                prediction=label,
                metrics={metric: value(label, answer.references) if value else float(label in answer.references)},
            )
            for answer in base
        ]
    if least:
        yield [replace(answer, metrics={metric: least}) for answer in base]


def _one_label(base: Sequence[Answer], metric: str) -> list[Answer]:
    """Return answers that always give one label: the most frequent, for an F1 the one that it looks for."""
    times = Counter(answer.metrics[GOLD] for answer in base)
    label = 1.0 if metric == "binary_f1" else max(times, key=lambda gold: times[gold])
    return [
        replace(
            answer,
            metrics={GOLD: answer.metrics[GOLD], ANSWERED: label, metric: float(answer.metrics[GOLD] == label)},
        )
        for answer in base
    ]


def _is_better(base: Sequence[Answer], guessed: Sequence[Answer], *, metric: str, level: float) -> bool:
    """Tell whether a test finds the base better than a guess at the same records."""
    found = difference(base, guessed, metric=metric)
    if found.standard_error is None:
        return True
    if found.standard_error == 0.0:
        return found.difference > 0.0
    return float(stdtr(found.num_clusters - 1, -found.difference / found.standard_error)) <= level
