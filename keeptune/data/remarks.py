"""Say in sentences what a user should know about the data: columns left unread, labels spelled twice, overlaps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from keeptune.data.labels import LabelCounts
from keeptune.data.leak_audit import LeakExample

_MANY = 0.05
_MAX_LISTED = 5


def unread(columns: Mapping[str, Mapping[str, int]], *, by: str = "keeptune") -> Iterator[str]:
    """Say which columns of each task are not read `by` what could, and how many rows have something in them."""
    for task, counts in columns.items():
        largest = sorted(counts.items(), key=lambda pair: -pair[1])
        listed = ", ".join(f"{column!r} ({_rows(number)})" for column, number in largest[:_MAX_LISTED])
        more = f" and {len(largest) - _MAX_LISTED} more" if len(largest) > _MAX_LISTED else ""
        if listed:
            noun = "a column" if len(largest) == 1 else "columns"
            yield f"{task}: {noun} that {by} does not read: {listed}{more}."


def labels(by_task: Mapping[str, LabelCounts], *, numbered: Mapping[str, str]) -> Iterator[str]:
    """Say which completions are likely one label, and of the tasks in `numbered` (task → column) which are numbers."""
    for task, found in by_task.items():
        if groups := found.spellings():
            shown = (", ".join(f'"{label}" ({number:,})' for label, number in group.items()) for group in groups)
            listed = "; ".join(itertools.islice(shown, _MAX_LISTED))
            more = f"; and {len(groups) - _MAX_LISTED} more labels" if len(groups) > _MAX_LISTED else ""
            yield (
                f"{task}: completions that differ in case or spaces alone: {listed}{more}. If they mean the same, "
                "spell them alike, or give each its name with `labels` in the task."
            )
        if task in numbered and found.are_numbers():
            lowest, highest = min(map(int, found.counts)), max(map(int, found.counts))
            numbers = f"{lowest} {'and' if len(found.counts) == 2 else 'to'} {highest}"
            yield (
                f"{task}: the completions are the numbers {numbers}, from the column {numbered[task]!r}. "
                "If they are classes, name them with `labels` in the task: words are easier for a model than numbers."
            )


def overlaps(*, num_removed: int, num_kept: int, num_train: int, example: LeakExample | None) -> Iterator[str]:
    """Say how many train records share text with held-out ones, if more than 5 % were removed or any were kept."""
    shown = ""
    if example is not None:
        shared = f', which share "{example.shared}"' if example.shared else ""
        shown = f" For example {example.train} and {example.held_out} ({example.split}){shared}."
    if num_removed > _MANY * num_train:
        yield (
            f"{num_removed:,} of {num_train:,} train records ({num_removed / num_train:.0%}) were removed because they "
            f"share more than half of a validation or test record.{shown} To keep them, set data.leaks=keep."
        )
    if num_kept:
        yield (
            f"{num_kept:,} of {num_train:,} train records share more than half of a record of the validation or test "
            f"file that their task brings along. They were kept, as these files were given so.{shown} To remove them, "
            "set data.leaks=drop."
        )


def _rows(number: int) -> str:
    return f"{number:,} {'row' if number == 1 else 'rows'}"
