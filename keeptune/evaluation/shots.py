"""A split and its records' exemplars arrive; the records behind the exemplars that fitted leave, and how many did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from keeptune.data.record import Record
from keeptune.evaluation.evaluate import SCORES, Exemplars, Split, prompt_tokens_mean
from keeptune.progress import Progress
from keeptune.storage import staged_folder, write_json
from keeptune.text.shots import Room, Shown, with_exemplars
from keeptune.text.table import Table
from keeptune.text.template import Template
from keeptune.text.tokenizer import Tokenizer


def trained_part(split: Split) -> Split:
    """Return the records of the tasks that are trained on, each beside its example: the others have no exemplars."""
    by_id = {record.id: record for record in split.records}
    ids = split.examples.record_ids
    kept = [i for i, id_ in enumerate(ids) if by_id[id_].task not in split.untrained_tasks]
    table = Table.of([split.examples[i] for i in kept], record_ids=[ids[i] for i in kept])
    return replace(split, records=[by_id[id_] for id_ in table.record_ids], examples=table)


def shown_split(
    split: Split,
    chosen: Sequence[Sequence[Record]],
    *,
    row: str,
    draw: int | Literal["nearest"],
    num_shots: int,
    tokenizer: Tokenizer,
    template: Template,
    room: Room,
    progress: Progress,
) -> tuple[Split, Exemplars, str]:
    """Return the split behind the exemplars chosen for each of its records, and the template's first refusal, if any.

    A record without room for one exemplar keeps its own prompt.
    """
    examples = [split.examples[i] for i in range(len(split.examples))]
    arguments = {"tokenizer": tokenizer, "template": template, "room": room}
    shown: list[Shown] = []
    progress.start(f"Prompts of {row}", total=len(examples), unit="records")
    for item in with_exemplars(split.records, examples, chosen, **arguments):
        shown.append(item)
        progress.advance()
    progress.finish()
    table = Table.of([item.example for item in shown], record_ids=split.examples.record_ids)
    ids = [[record.id for record in before] for before in chosen]
    numbers = [item.num_shown for item in shown]
    exemplars = Exemplars(
        row=row,
        draw=draw,
        ids={} if draw == "nearest" else {record.task: of for record, of in zip(split.records, ids, strict=True)},
        shown={r.id: of[len(of) - n :] for r, of, n in zip(split.records, ids, numbers, strict=True)},
        num_fitted=sum(number < num_shots for number in numbers),
        num_without_exemplars=numbers.count(0),
        num_refused=sum(item.refusal != "" for item in shown),
        num_shown_mean=sum(numbers) / max(1, len(numbers)),
        own_prompt_tokens_mean=prompt_tokens_mean(split.examples),
    )
    return replace(split, examples=table), exemplars, next((item.refusal for item in shown if item.refusal), "")


def write_left_out(
    folder: Path, *, name: str, shots: int, exemplars: Exemplars, reason: str, facts: Mapping[str, Any]
) -> None:
    """Write to `folder` that this row has no answers, and why."""
    header = {"model": name, "shots": shots, **exemplars.header(), "left_out": reason}
    with staged_folder(folder, facts=facts) as staging:
        write_json(staging / SCORES, {**header, "scores": []})
