"""Several models' answers to one test set arrive; the difference of every pair of them leaves, with its p-values.

A difference counts as clear where its p-value, corrected by Holm over the declared family, is below 0.05. The family is
every pair of models in the main metric over all tasks together, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from scipy.special import bdtr, stdtr

from keeptune.data.record import ALL_TASKS
from keeptune.evaluation.metrics import LOSS_METRICS, Answer, metric_of
from keeptune.evaluation.scores import Paired, is_binary, paired_differences

# Below as many changed records, McNemar's test is the exact binomial one.
_EXACT_BELOW = 25
# A standard error that is this small a part of its difference is nothing but rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference with its two-sided p-values.

    `p_value` is that of Student's t, clustered by input; None where one cluster is all. `holm_p_value` stands in the
    declared family only. `mcnemar_p_value` stands where every value is 0 or 1 and no two records share an input.
    """

    paired: Paired
    p_value: float | None
    holm_p_value: float | None
    mcnemar_p_value: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as `comparison.json` holds it."""
        p_values = ("p_value", "holm_p_value", "mcnemar_p_value")
        return {**asdict(self.paired), **{name: getattr(self, name) for name in p_values}}


def compare_models(
    answers: Mapping[str, Sequence[Answer]],
    *,
    metrics: Sequence[str],
    main_metric: str,
    untrained_tasks: Collection[str] = (),
    without_loss: Collection[str] = (),
    apart: Collection[frozenset[str]] = (),
) -> list[Comparison]:
    """Return the later model of every pair minus the earlier one, in each task and metric; no pair that is in `apart`.

    The losses of the models in `without_loss` count other tokens: they are compared with no other model's.

    Raises:
        DataError: two do not answer the same records in the same order.
    """
    found = []
    for against, model in combinations(answers, 2):
        if frozenset((against, model)) in apart:
            continue
        shared = [m for m in metrics if m not in LOSS_METRICS or not {against, model} & set(without_loss)]
        found += paired_differences(
            answers[model],
            answers[against],
            metrics=shared,
            model=model,
            against=against,
            untrained_tasks=untrained_tasks,
        )
    p_values = [_p_value(paired) for paired in found]
    family = [i for i, paired in enumerate(found) if (paired.task, paired.metric) == (ALL_TASKS, main_metric)]
    corrected = dict(zip(family, holm([p_values[i] for i in family]), strict=True))
    binary = {(name, metric) for name in answers for metric in metrics if is_binary(answers[name], metric_of(metric))}
    return [
        Comparison(paired, p_values[i], corrected.get(i), _mcnemar_p_value(paired, binary=binary))
        for i, paired in enumerate(found)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the corrected p-values: calling those below 0.05 clear is wrong about any of them with 5 % at most.

    None stays None and counts for nothing.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    ordered = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p))
        corrected[i] = largest
    return corrected


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of as many records lost and gained, if each were as likely to be either.

    Exact binomial below 25 changed records, else mid-p, which counts half of what is exactly as extreme.

    Source: Fagerland, Lydersen and Laake 2013, "The McNemar test for binary matched-pairs data: mid-p and asymptotic
    are better than exact conditional", BMC Medical Research Methodology 13:91.
    """
    changed, fewer = lost + gained, min(lost, gained)
    at_most = float(bdtr(fewer, changed, 0.5))
    if changed < _EXACT_BELOW:
        return min(1.0, 2 * at_most)
    less = float(bdtr(fewer - 1, changed, 0.5)) if fewer else 0.0
    return at_most + less


def _p_value(paired: Paired) -> float | None:
    """Return the p-value of the paired t test with one cluster less than there are as degrees of freedom.

    Where all clusters moved alike there is no spread to divide by; then 2^(1 - clusters), the least that a two-sided
    test which flips the signs of the clusters' differences can give.
    """
    error, difference = paired.standard_error, paired.difference
    if error is None:
        return None
    if error <= _ROUNDING * abs(difference):
        return 1.0 if difference == 0 else 2.0 ** (1 - paired.num_clusters)
    return float(2 * stdtr(paired.num_clusters - 1, -abs(difference) / error))


def _mcnemar_p_value(paired: Paired, *, binary: Collection[tuple[str, str]]) -> float | None:
    both = {(paired.model, paired.metric), (paired.against, paired.metric)} <= set(binary)
    if not both or paired.num_clusters != paired.num_records:
        return None
    return mcnemar(paired.worse, paired.better)
