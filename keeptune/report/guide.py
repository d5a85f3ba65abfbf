"""A report's tables arrive; sentences for a reader who has never tuned a model leave: what was done, where to look."""

from __future__ import annotations

from collections.abc import Iterator

from keeptune.progress import noun
from keeptune.report.headline import base_label, series
from keeptune.report.tables import Report
from keeptune.report.wording import count, parameters


def reading_notes(report: Report) -> list[str]:
    """Return what the run did and what to look at, for a reader who has never tuned a model; none for an empty run."""
    if report.selection.selected is None:
        return []
    return [*_what_was_done(report), *_what_to_look_at(report)]


def _what_was_done(report: Report) -> Iterator[str]:
    num_train = report.audit.num_train
    given = f"{count(num_train)} {noun(num_train, 'examples')}" if num_train is not None else "Examples"
    tasks = noun(len(report.trained_tasks), "tasks")
    yield (
        f"{base_label(report)} is a model that existed before. {given} of the {tasks} "
        f"{series(report.trained_tasks)}, each a prompt with the answer that is wanted, were shown to copies of it, "
        "again and again; after every few of them its numbers (its parameters) were "
        "moved a little, so that the wanted answers became more likely."
    )
    for cost in report.costs:
        trained, total = parameters(cost.trained_parameters), parameters(cost.total_parameters)
        yield (
            f"The method “{cost.model}” moved all {total} parameters: full fine-tuning."
            if cost.peft_type is None
            else f"The method “{cost.model}” left the model’s own parameters as they were and trained {trained} new "
            f"ones beside them ({cost.peft_type})."
        )
    yield (
        "No training example is among the test records. The validation records chose how long to train and which "
        "method to deliver; the test records were answered once, at the end. “base” is the model before."
    )


def _what_to_look_at(report: Report) -> Iterator[str]:
    names = [metric.name for metric in report.metrics]
    if "exact_match" in names:
        yield "Exact match is the share of answers that are the wanted ones word for word: 0 is none, 1 is all."
    if "rougeL" in names:
        yield "ROUGE-L says how much of the wording agrees with the wanted answer, from 0 to 1."
    yield (
        "Another draw of test records would give another figure; the 95 % interval shows how far that could move it. "
        "Where the interval of a difference holds 0, the data do not tell the two models apart."
    )
    if report.other_tasks:
        yield (
            "A model that learns one thing can lose others, which is called catastrophic forgetting. So the models "
            f"also answered {series(report.other_tasks)}, on which nothing was trained. Look "
            "first at “Task by task”: the gain stands in the upper part, what was lost in the lower one."
        )
    else:
        yield "Look first at “Scores on test”; then read “Best and worst answers”, which no figure replaces."
