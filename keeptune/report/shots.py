"""The base model's few-shot scores arrive, a row for each choice of examples; means over choices and costs leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from keeptune.data.record import ALL_TASKS
from keeptune.evaluation.intervals import NO_INTERVAL, mean_of_draws
from keeptune.evaluation.metrics import metric_of
from keeptune.report.reading import mapping, number, string, whole
from keeptune.report.scores import Score, read_scores

# Operations for each parameter and token: 2 to read it in a prompt, 6 to train on it, of which PEFT saves the 2 of the
# frozen weights' own gradients. Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
_TRAINING_OVER_READING = {"full": 6 / 2, "peft": 4 / 2}


@dataclass(frozen=True, slots=True)
class ShotRow:
    """Answers of the base behind one choice of examples; `left_out` says why there are none.

    Of `num_records` prompts, `num_fitted` show fewer examples than `shots`, `num_without_exemplars` of them none.
    """

    name: str
    shots: int
    draw: int | None
    scores: tuple[Score, ...]
    prompt_tokens_mean: float | None
    own_prompt_tokens_mean: float | None
    num_records: int | None
    num_fitted: int | None
    num_without_exemplars: int | None
    num_shown_mean: float | None
    left_out: str | None

    def score(self, metric: str) -> float | None:
        """Return the mean over all tasks, None where it was not measured."""
        return next((s.mean for s in self.scores if (s.metric, s.task) == (metric, ALL_TASKS)), None)

    @property
    def is_nearest(self) -> bool:
        """Whether each prompt shows the examples most similar to it, in place of one random choice for all."""
        return self.draw is None


@dataclass(frozen=True, slots=True)
class FewShot:
    """A few-shot score: the mean over `num_draws` choices of examples, with its 95 % interval [low, high].

    The interval is over records and choices, of a single choice over records alone. `lowest` and `highest` are the
    choices', None where there is one. `rows` names the choices.
    """

    name: str
    shots: int
    is_nearest: bool
    task: str
    metric: str
    mean: float
    lowest: float | None
    highest: float | None
    low: float | None
    high: float | None
    num_draws: int
    num_records: int | None
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompting:
    """What examples in the prompt cost, over all choices of examples: mean tokens, and how many prompts show fewer.

    `queries` holds for each method the queries from which its training was cheaper than sending the examples along;
    None where that cannot be told.
    """

    name: str
    shots: int
    is_nearest: bool
    prompt_tokens_mean: float | None
    extra_tokens_mean: float | None
    num_prompts: int
    num_fitted: int
    num_without_exemplars: int
    num_shown_mean: float | None
    queries: tuple[tuple[str, float | None], ...]


def num_shots(value: Mapping[str, Any]) -> int:
    """Return how many examples stood in the prompts of a `scores.json`."""
    scores = read_scores(value)
    return whole(value.get("shots")) or (scores[0].shots if scores else 0)


def read_shot_row(value: Mapping[str, Any]) -> ShotRow:
    """Return the few-shot answers that a `scores.json` describes."""
    shots, draw = num_shots(value), mapping(value.get("exemplars")).get("draw")
    name = f"{string(value.get('model')) or '?'}, {shots} shots"
    return ShotRow(
        name=string(value.get("row")) or name,
        shots=shots,
        draw=whole(draw),
        scores=read_scores(value),
        prompt_tokens_mean=number(value.get("prompt_tokens_mean")),
        own_prompt_tokens_mean=number(value.get("own_prompt_tokens_mean")),
        num_records=whole(value.get("num_records")),
        num_fitted=whole(value.get("num_fitted")),
        num_without_exemplars=whole(value.get("num_without_exemplars")),
        num_shown_mean=number(value.get("num_shown_mean")),
        left_out=string(value.get("left_out")),
    )


def few_shot_scores(rows: Sequence[ShotRow]) -> Iterator[FewShot]:
    """Yield one score for each number of shots, task and metric; the nearest examples have their own."""
    for name, of_one_number in _grouped(rows):
        scored = [(score, row) for row in of_one_number for score in row.scores if _is_finite(score.mean)]
        for task, metric in dict.fromkeys((score.task, score.metric) for score, _ in scored):
            found = [(score, row) for score, row in scored if (score.task, score.metric) == (task, metric)]
            yield _few_shot(name, found)


def _few_shot(name: str, found: Sequence[tuple[Score, ShotRow]]) -> FewShot:
    means, (score, row) = [score.mean or 0.0 for score, _ in found], found[0]
    single = len(found) == 1
    ends = mean_of_draws(
        means,
        [of_draw.standard_error for of_draw, _ in found],
        bounds=metric_of(score.metric).bounds,
        num_clusters=score.num_clusters or 0,
    )
    # Draws that all gave the same, of records that all agree, leave the doubt of one.
    low, high = (score.low, score.high) if single or ends == NO_INTERVAL else ends
    return FewShot(
        name=name,
        shots=row.shots,
        is_nearest=row.is_nearest,
        task=score.task,
        metric=score.metric,
        mean=math.fsum(means) / len(means),
        lowest=None if single else min(means),
        highest=None if single else max(means),
        low=low,
        high=high,
        num_draws=len(found),
        num_records=score.num_records,
        rows=tuple(row.name for _, row in found),
    )


def few_shot_left_out(rows: Sequence[ShotRow]) -> list[tuple[str, str]]:
    """Return (name, reason) of each number of shots that has no score at all."""
    found = []
    for name, of_one_number in _grouped(rows):
        reasons = [row.left_out for row in of_one_number if row.left_out is not None]
        if len(reasons) == len(of_one_number):
            found.append((name, reasons[0].removeprefix(f"{of_one_number[0].name}: ")))
    return found


def prompting_costs(rows: Sequence[ShotRow], *, trained: Sequence[tuple[str, int | None, bool]]) -> Iterator[Prompting]:
    """Yield what each number of shots costs; `trained` holds each method, its tokens trained on, and if it was full."""
    for name, of_one_number in _grouped(rows):
        answered = [row for row in of_one_number if row.left_out is None]
        if not answered:
            continue
        first, tokens = answered[0], _mean([row.prompt_tokens_mean for row in answered])
        own = _mean([row.own_prompt_tokens_mean for row in answered])
        extra = tokens - own if tokens is not None and own is not None else None
        yield Prompting(
            name=name,
            shots=first.shots,
            is_nearest=first.is_nearest,
            prompt_tokens_mean=tokens,
            extra_tokens_mean=extra,
            num_prompts=sum(row.num_records or 0 for row in answered),
            num_fitted=sum(row.num_fitted or 0 for row in answered),
            num_without_exemplars=sum(row.num_without_exemplars or 0 for row in answered),
            num_shown_mean=_mean([row.num_shown_mean for row in answered]),
            queries=tuple(
                (method, queries_until_cheaper(number, extra_tokens=extra, full=full))
                for method, number, full in trained
            ),
        )


def queries_until_cheaper(num_train_tokens: int | None, *, extra_tokens: float | None, full: bool) -> float | None:
    """Return after how many queries a training cost less than `extra_tokens` more in each prompt; None: not known.

    Counted are operations: a query's own tokens and its answer cost the same either way.
    """
    if num_train_tokens is None or extra_tokens is None or extra_tokens <= 0:
        return None
    return _TRAINING_OVER_READING["full" if full else "peft"] * num_train_tokens / extra_tokens


def _grouped(rows: Sequence[ShotRow]) -> Iterator[tuple[str, list[ShotRow]]]:
    """Yield the rows of each number of shots with their common name, those of the nearest last."""

    def place(row: ShotRow) -> tuple[bool, int]:
        return row.is_nearest, row.shots

    for _, of_one_number in groupby(sorted(rows, key=lambda row: (*place(row), row.draw or 0)), key=place):
        members = list(of_one_number)
        yield members[0].name.rpartition(", draw ")[0] or members[0].name, members


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
