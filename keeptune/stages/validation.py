"""Choices that validation makes of a certificate: certified models, or prompts of the base, arrive; their values leave.

Nothing here opens test or the certify records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keeptune.config import Recipe
from keeptune.progress import noun
from keeptune.stages.computing import policy_of
from keeptune.stages.data import Data, evaluation_split, max_new_tokens
from keeptune.stages.run import Run, stage_key
from keeptune.stages.shots import SHOTS_VERSION, ShotRow, shot_rows, split_behind
from keeptune.stages.training import make_bench
from keeptune.stages.way import BASE, load_base, open_way

if TYPE_CHECKING:
    from torch import nn

    from keeptune.evaluation.evaluate import Bench, Split
    from keeptune.model.methods import Method
    from keeptune.retention.walk import Choice


def higher_is_better(recipe: Recipe) -> bool:
    """Tell in which direction the metric that selects is good."""
    from keeptune.evaluation.metrics import METRICS

    return METRICS[recipe.evaluation.select_by].higher_is_better


def describe_tie(selected: str, *, metric: str, values: Mapping[str, float | None]) -> str:
    """Return in words that the validation loss chose among methods with the same value; "" where it did not."""
    tied = [name for name, value in values.items() if value is not None and value == values[selected]]
    if metric == "loss" or len(tied) < 2:
        return ""
    return (
        f"{', '.join(tied)} have the same {metric} on validation, {values[selected]:.3f}: {selected} has the lowest "
        "validation loss of these."
    )


def certified_values(
    run: Run, data: Data, *, methods: Mapping[str, Method], certified: Sequence[Choice]
) -> tuple[dict[tuple[str, float], float], dict[tuple[str, float], float]]:
    """Return each certified model's value on validation, and its loss there, which decides between equal values."""
    split = evaluation_split(data, "validation")
    values: dict[tuple[str, float], float] = {}
    losses: dict[tuple[str, float], float] = {}
    select_by = run.recipe.evaluation.select_by
    for name in dict.fromkeys(choice.candidate for choice in certified):
        way = open_way(run, data, methods[name])
        bench = _bench(run, data, way.model)
        for choice in certified:
            if choice.candidate == name:
                way.set_(choice.alpha)
                values[name, choice.alpha] = value = _value(run, way.model, split=split, bench=bench)
                losses[name, choice.alpha] = (
                    value if select_by == "loss" else _value(run, way.model, split=split, bench=bench, metric="loss")
                )
    return values, losses


def best_prompt(run: Run, data: Data, *, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return which prompt of the base model is best on validation: the record's own, or one behind solved examples.

    Of each number of examples the first draw is tried, and the nearest ones where the recipe has them; equals go to
    the fewest. `before`, what this returned once, is returned again where it asked the same.
    """
    evaluation = run.recipe.evaluation
    rows = [row for row in shot_rows(evaluation) if row.draw in (1, "nearest")]
    key = stage_key(
        data=data.key,
        weights=data.base.facts.sha256,
        rows=[SHOTS_VERSION, *([row.num_shots, row.draw] for row in rows)],
        metric=evaluation.select_by,
        num_records=evaluation.num_validation_records,
        **policy_of(run.recipe).answers_key(),
    )
    if before is not None and before.get("key") == key:
        return dict(before)
    model = load_base(run, data)
    bench, split = _bench(run, data, model), evaluation_split(data, "validation")
    train = data.records("train") if rows else []
    run.context.progress.say(f"{BASE}: trying {len(rows) + 1} {noun(len(rows) + 1, 'prompts')} on validation")
    tried: list[tuple[ShotRow | None, float]] = [(None, _value(run, model, split=split, bench=bench))]
    for row in rows:
        behind, _, left_out = split_behind(row, run=run, data=data, split=split, train=train)
        if not left_out:
            tried.append((row, _value(run, model, split=behind, bench=bench)))
    sign = 1.0 if higher_is_better(run.recipe) else -1.0
    row, best = max(tried, key=lambda one: (sign * one[1], -(one[0].num_shots if one[0] else 0)))
    return {
        "key": key,
        "model": BASE,
        "shots": row.num_shots if row else 0,
        "draw": row.draw if row else None,
        "metric": evaluation.select_by,
        "split": "validation",
        "values": [
            {"shots": r.num_shots if r else 0, "draw": r.draw if r else None, "value": value} for r, value in tried
        ],
        "sentence": _sentence(row, best, tried=tried, metric=evaluation.select_by),
    }


def _sentence(row: ShotRow | None, best: float, *, tried: Sequence[tuple[ShotRow | None, float]], metric: str) -> str:
    others = [f"{_worded(r)}: {value:.3f}" for r, value in tried if r != row]
    chosen = f"Use the base model {_worded(row)}"
    if not others:
        return f"{chosen}: no other prompt was tried."
    return f"{chosen}: of the prompts tried on validation it has the best {metric}, {best:.3f} ({', '.join(others)})."


def _worded(row: ShotRow | None) -> str:
    if row is None:
        return "without examples in its prompt"
    kind = "of the most similar solved" if row.draw == "nearest" else "solved"
    return f"with {row.num_shots} {kind} {noun(row.num_shots, 'examples')} in its prompt"


def _bench(run: Run, data: Data, model: nn.Module) -> Bench:
    return make_bench(run, data, model, max_new_tokens=max_new_tokens(run.recipe, data))


def _value(run: Run, model: nn.Module, *, split: Split, bench: Bench, metric: str | None = None) -> float:
    from keeptune.evaluation.evaluate import validation_value

    evaluation = run.recipe.evaluation
    run.poll()
    number = evaluation.num_validation_records
    return validation_value(model, split=split, bench=bench, metric=metric or evaluation.select_by, num_records=number)
