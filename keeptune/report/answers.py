"""Test answers of two models arrive; the best and the worst of one leave, beside the truth and the base's answer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.evaluation.metrics import metric_of
from keeptune.report.reading import RunFolder, mapping, number, string

NUM_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Answer:
    """One test record: what was asked, what was right, and what the tuned model and the base answered."""

    id: str
    task: str
    prompt: str
    references: tuple[str, ...]
    prediction: str
    value: float
    ended: bool
    base_prediction: str | None
    base_value: float | None


@dataclass(frozen=True, slots=True)
class Answers:
    """The best and the worst answers of `model` by `metric`; the two never share a record."""

    model: str
    metric: str
    best: tuple[Answer, ...]
    worst: tuple[Answer, ...]
    num_records: int
    num_without_value: int


@dataclass(frozen=True, slots=True)
class _Base:
    """The base model's answer to a record."""

    prediction: str
    value: float | None


def read_answers(
    folder: RunFolder,
    *,
    model: str,
    base: str | None,
    metric: str,
    higher_is_better: bool,
    untrained_tasks: Collection[str] = (),
) -> Answers | None:
    """Return the six best and six worst test answers of a method, None where it has none.

    Those to `untrained_tasks` are left out: they would fill the worst.
    They are ranked by the metric, then by the gain over the base (best: the largest first; worst: the largest loss
    first), then by id. Fewer than twelve records are shared out, the larger half to the best. An answer with the
    highest score that there is, is never among the worst.

    Raises:
        StorageError: the disk refuses to read a file that exists.
    """
    values: list[tuple[float, float, str, int]] = []
    num_without_value = 0
    base_lines = folder.lines(base) if base else iter(())
    bases = {id_: found for id_, found in _base_answers(base_lines, metric=metric)}
    sign = 1.0 if higher_is_better else -1.0
    name = f"{model}/test/samples.jsonl"
    for position, line in enumerate(folder.lines(name)):
        if string(line.get("task")) in untrained_tasks:
            continue
        value = _value(line, metric)
        if value is None:
            num_without_value += 1
            continue
        id_ = string(line.get("id")) or ""
        before = bases[id_].value if id_ in bases else None
        values.append((sign * value, sign * (value - before) if before is not None else 0.0, id_, position))
    if not values:
        return None
    num_best = min(NUM_SHOWN, math.ceil(len(values) / 2))
    best = heapq.nsmallest(num_best, values, key=lambda v: (-v[0], -v[1], v[2], v[3]))
    taken = {v[3] for v in best}
    perfect = metric_of(metric).bounds[1] if higher_is_better else math.inf
    worst = heapq.nsmallest(NUM_SHOWN, (v for v in values if v[3] not in taken and v[0] < perfect))
    wanted = taken | {v[3] for v in worst}
    found = {
        position: _answer(line, metric=metric, bases=bases)
        for position, line in enumerate(folder.lines(name))
        if position in wanted
    }
    return Answers(
        model=model,
        metric=metric,
        best=tuple(found[v[3]] for v in best),
        worst=tuple(found[v[3]] for v in worst),
        num_records=len(values),
        num_without_value=num_without_value,
    )


def _base_answers(lines: Iterator[Mapping[str, Any]], *, metric: str) -> Iterator[tuple[str, _Base]]:
    for line in lines:
        id_ = string(line.get("id"))
        if id_ is not None:
            yield id_, _Base(string(line.get("prediction")) or "", _value(line, metric))


def _value(line: Mapping[str, Any], metric: str) -> float | None:
    found = number(mapping(line.get("metrics")).get(metric))
    return found if found is not None and math.isfinite(found) else None


def _answer(line: Mapping[str, Any], *, metric: str, bases: Mapping[str, _Base]) -> Answer:
    id_ = string(line.get("id")) or ""
    base = bases.get(id_)
    references = line.get("references")
    value = _value(line, metric)
    assert value is not None, "only records with a value are ranked"
    return Answer(
        id=id_,
        task=string(line.get("task")) or "",
        prompt=string(line.get("prompt")) or "",
        references=tuple(r for r in references if isinstance(r, str)) if isinstance(references, list) else (),
        prediction=string(line.get("prediction")) or "",
        value=value,
        ended=line.get("ended") is not False,
        base_prediction=base.prediction if base else None,
        base_value=base.value if base else None,
    )


def read_flips(
    folder: RunFolder, *, tuned: str, base: str, metric: str, higher_is_better: bool, tasks: Collection[str]
) -> tuple[Answer, ...]:
    """Return for up to six of `tasks` the record that lost most: the base had it right, or nearer, and `tuned` wrong.

    `tuned` and `base` are the files with their answers. Tasks that lost most on a single record come first.

    Raises:
        StorageError: the disk refuses to read a file that exists.
    """
    bases = {id_: found for id_, found in _base_answers(folder.lines(base), metric=metric)}
    sign = 1.0 if higher_is_better else -1.0
    most: dict[str, tuple[float, str, int]] = {}
    for position, line in enumerate(folder.lines(tuned)):
        task, id_, value = string(line.get("task")) or "", string(line.get("id")) or "", _value(line, metric)
        before = bases[id_].value if id_ in bases else None
        if task not in tasks or value is None or before is None or sign * (before - value) <= 0:
            continue
        # Of equals the least id, so that the same folder gives the same page.
        most[task] = min(most.get(task, (math.inf, "", 0)), (sign * (value - before), id_, position))
    wanted = [position for _, _, position in sorted(most.values())[:NUM_SHOWN]]
    found = {
        position: _answer(line, metric=metric, bases=bases)
        for position, line in enumerate(folder.lines(tuned))
        if position in wanted
    }
    return tuple(found[position] for position in wanted)
