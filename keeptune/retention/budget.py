"""The recipe's words for a budget arrive; how much of which metric may be lost leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NoReturn

from keeptune.errors import RecipeError
from keeptune.evaluation.metrics import LOSS_METRICS, metric_problems
from keeptune.progress import noun
from keeptune.retention.drops import metric_scale

_BUDGET = re.compile(r"(?P<amount>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?) *(?P<unit>[a-z]+)( +of +(?P<metric>\w+))?", re.I)
_PERCENT = re.compile(r"%|\bper ?cent\b", re.I)
_UNITS: dict[str, Literal["points", "nats"]] = {"point": "points", "points": "points", "nat": "nats", "nats": "nats"}
_POINTS_OF_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of `metric` one suite may lose: `amount` in the metric's own units.

    A point is 0.01 of a metric in [0, 1] and 1.0 of BLEU or chrF; a nat is one of loss per token. What a single record
    loses or gains beyond `scale` counts as `scale`: the most that a metric can fall, and of nats what the recipe says.
    """

    amount: float
    unit: Literal["points", "nats"]
    metric: str
    scale: float = 1.0

    def worded(self, amount: float) -> str:
        """Return a loss in words: "0.012 of exact_match" or "0.012 nats"."""
        return f"{amount:.3g} nats" if self.unit == "nats" else f"{amount:.3g} of {self.metric}"


def parse_budget(text: str, *, suite: str, main_metric: str, loss_cap: float) -> Budget:
    """Return the budget that a recipe gives `suite`, as in "1 point of exact_match", "2 points" or "0.02 nats".

    Points without a metric are points of `main_metric`, the one that the suite is scored by. `loss_cap` is the most
    nats that a record counts.

    Raises:
        RecipeError: the text is no such budget, or none that could be certified.
    """
    where = f"retention.budget.{suite}"
    if _PERCENT.search(text):
        expected = "points or nats, because 1 % may be one of the base model's score or of the whole scale"
        _refuse(where, text, expected=expected, example=_example(main_metric))
    match = _BUDGET.fullmatch(text.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        _refuse(where, text, expected="a number with its unit, points or nats", example=_example(main_metric))
    unit = _UNITS[match["unit"].lower()]
    metric = match["metric"] or (main_metric if unit == "points" else "loss")
    # A harness task's own metric is none that keeptune computes.
    if metric != main_metric and (problems := metric_problems([metric])):
        raise RecipeError(f"{where}: {problems[0]}")
    if (unit == "nats") != (metric == "loss") or metric == "perplexity":
        expected = "nats of the loss, or points of a metric other than it and perplexity"
        _refuse(where, text, expected=expected, example=_example(metric))
    scale = loss_cap if unit == "nats" else metric_scale(metric)
    amount = float(match["amount"]) * (scale / _POINTS_OF_SCALE if unit == "points" else 1.0)
    if not 0.0 < amount < scale:
        largest = "100 points" if unit == "points" else f"{scale:g} {noun(scale, 'nats')} (retention.loss_cap)"
        _refuse(where, text, expected=f"more than 0 and less than {largest}", example=_example(metric))
    return Budget(amount, unit, metric, scale)


def _example(metric: str) -> str:
    return "'0.02 nats'" if metric in LOSS_METRICS else f"'1 point of {metric}'"


def _refuse(where: str, text: str, *, expected: str, example: str) -> NoReturn:
    raise RecipeError(f"{where}: found {text!r}; expected {expected}. Write for example {example}.")
