"""Train records arrive; the solved examples of few-shot prompts leave: drawn once for a task, or the nearest ones.

Neither depends on the order of the records. What stands last in a prompt, next to the question, comes last.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from keeptune.data.bm25 import Bm25
from keeptune.data.record import Record


def drawn_exemplars(records: Iterable[Record], *, seed: int, num_shots: int, draw: int) -> dict[str, list[Record]]:
    """Return `num_shots` records of each task, or all of them where it has fewer: one random choice for all questions.

    A record's place in a draw is a hash of seed, draw, task and id. So what a draw shows does not move with other
    records' order, and fewer shots are the end of more.
    """

    def place(record: Record) -> bytes:
        return hashlib.sha256(f"{seed} {draw} {record.task} {record.id}".encode()).digest()

    return {task: sorted(members, key=place)[:num_shots][::-1] for task, members in _by_task(records).items()}


def nearest_exemplars(
    records: Iterable[Record], *, questions: Sequence[Record], num_shots: int
) -> Iterator[list[Record]]:
    """Yield for each question the `num_shots` records of its task whose prompts match it best, the best one last.

    They are ranked by BM25 over the words of the prompts, then by id.
    """
    tasks = {task: sorted(members, key=lambda record: record.id) for task, members in _by_task(records).items()}
    indices = {task: Bm25([record.prompt for record in members]) for task, members in tasks.items()}
    for question in questions:
        members = tasks.get(question.task, [])
        number = min(num_shots, len(members))
        if not number:
            yield []
            continue
        scores = indices[question.task].scores(question.prompt)
        # All that reach the last place, equals included, are then put in order: a whole sort for each question is slow.
        candidates = np.flatnonzero(scores >= np.partition(scores, -number)[-number])
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:number]
        yield [members[i] for i in best[::-1]]


def _by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return each task's records, exact copies once."""
    tasks: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        tasks[record.task].setdefault(record.id, record)
    return {task: list(members.values()) for task, members in tasks.items()}
