"""Splits: a recipe arrives; records, tokens and audit of every split leave, in one folder."""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from keeptune.config import Recipe
from keeptune.data.record import PART_NAMES, SPLIT_NAMES, PartName, SplitName
from keeptune.errors import DataError
from keeptune.progress import Progress
from keeptune.stages.data import (
    Base,
    length_policy,
    max_length,
    max_positions,
    rendering,
    require_embeddings,
)
from keeptune.stages.parts import divided
from keeptune.storage import storage_errors, write_json, write_lines

if TYPE_CHECKING:
    from keeptune.data.audit import Audit
    from keeptune.data.disk import Records
    from keeptune.text.table import TokenCounts
    from keeptune.text.template import Template
    from keeptune.text.tokens import Tokenized


def write_data(recipe: Recipe, base: Base, folder: Path, *, progress: Progress) -> Audit:
    """Write records, tokens and audit of every split into `folder`.

    Raises:
        DataError: a split is empty.
    """
    from keeptune.data.prepare import TaskSource, prepare_records

    data = recipe.data
    with storage_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
        prepared = prepare_records(
            [TaskSource(**task.model_dump(exclude={"train"}), trained=task.train) for task in data.tasks],
            seed=recipe.seed,
            validation_fraction=data.validation_fraction,
            test_fraction=data.test_fraction,
            drop_incomplete=data.drop_incomplete,
            duplicates=data.duplicates,
            leaks=data.leaks,
            progress=progress,
            scratch=Path(scratch),
        )
        if (room := max_length(recipe, base)) < data.max_length:
            progress.say(
                f"data.max_length lowered from {data.max_length} to {room}: the model has room for no more tokens"
            )
        (folder / "tokens").mkdir()
        fates = _Fates(untrained_tasks=prepared.audit.untrained_tasks, template=base.template)
        counts = [
            _write_split(recipe, base, folder, split=split, records=records, fates=fates, progress=progress)
            for split, records in divided(recipe, prepared).items()
        ]
    audit = _with_tokens(prepared.audit, counts=counts, fates=fates)
    _require_every_split(audit)
    for task, of_task in audit.tasks.items():
        wanted = ("test",) if task in audit.untrained_tasks else SPLIT_NAMES
        empty = [split for split in wanted if not getattr(of_task, split)]
        if empty:
            progress.say(f"{task}: no record in {' and '.join(empty)}; it is not scored there")
    progress.say(audit.summary())
    write_json(folder / "audit.json", {**audit.to_json(), "references": fates.references.to_json()})
    return audit


class _Fates:
    """What becomes of records, counted by task and split: those that are kept, and those too long, as they pass."""

    def __init__(self, *, untrained_tasks: Collection[str], template: Template) -> None:
        from keeptune.data.audit import Lengths
        from keeptune.evaluation.legible import References

        self.kept: Counter[tuple[str, SplitName | PartName]] = Counter()
        self.too_long: Counter[tuple[str, SplitName | PartName]] = Counter()
        self.lengths = Lengths()
        self.references = References()
        self.unread: dict[str, Counter[str]] = {}
        self._template = template
        self._untrained_tasks = frozenset(untrained_tasks)

    def count(self, item: Tokenized, *, split: SplitName | PartName) -> None:
        """Count a record."""
        task = item.record.task
        (self.too_long if item.example is None else self.kept)[task, split] += 1
        for name in self._template.unread(item.record.messages, tools=item.record.tools):
            self.unread.setdefault(task, Counter())[name] += 1
        if item.example is not None:
            self.references.add(task, item.record.completion)
            trained = task not in self._untrained_tasks
            self.lengths.add(item.prompt_tokens, item.completion_tokens, trained=trained)

    @property
    def parts(self) -> dict[str, dict[PartName, int]]:
        """The records that are kept in each part of a suite, by suite."""
        parts: dict[str, dict[PartName, int]] = {}
        for part in PART_NAMES:
            for (task, split), number in self.kept.items():
                if split == part:
                    parts.setdefault(task, {})[part] = number
        return parts


def _write_split(
    recipe: Recipe,
    base: Base,
    folder: Path,
    *,
    split: SplitName | PartName,
    records: Records,
    fates: _Fates,
    progress: Progress,
) -> TokenCounts:
    """Write the tokens and the records of a split; return what was counted of the tokens."""
    from keeptune.data.heap import give_back_freed
    from keeptune.text.table import TokenTable
    from keeptune.text.tokens import tokenize

    progress.start(f"Tokenising {split}", total=len(records), unit="records")
    limits = {**length_policy(recipe, base), "max_positions": max_positions(recipe, base)}
    kept = array("b")

    def counted(items: Iterable[Tokenized]) -> Iterator[Tokenized]:
        for item in items:
            progress.advance()
            fates.count(item, split=split)
            kept.append(item.example is not None)
            yield item

    tokenized = tokenize(records, **rendering(recipe, base), **limits)
    table = TokenTable.write(folder / "tokens" / f"{split}.arrow", counted(tokenized))
    progress.finish()
    give_back_freed()
    require_embeddings(table, base=base)
    write_lines(folder / f"{split}.jsonl", itertools.compress(records.lines(), kept))
    return table.counts


def _with_tokens(audit: Audit, *, counts: Sequence[TokenCounts], fates: _Fates) -> Audit:
    """Return the audit with its token part and what was dropped for its length."""
    from keeptune.data.audit import token_audit
    from keeptune.data.remarks import unread

    tokens = token_audit(
        fates.lengths,
        truncated=sum(count.num_truncated for count in counts),
        completion_cut=sum(count.num_completions_cut for count in counts),
        too_long=sum(count.num_dropped for count in counts),
        supervised_tokens=sum(count.num_targets for count in counts),
    )
    remarks = (*audit.remarks, *unread(fates.unread, by="the template"))
    tasks = {*audit.unread_columns, *fates.unread}
    columns = {task: {**audit.unread_columns.get(task, {}), **fates.unread.get(task, {})} for task in sorted(tasks)}
    audit = replace(audit, remarks=remarks, unread_columns=columns)
    return audit.with_tokens(tokens, too_long=fates.too_long, parts=fates.parts)


def _require_every_split(audit: Audit) -> None:
    """Refuse splits without a record of the tasks that are trained on."""
    counts = {split: getattr(audit.trained_splits, split) for split in SPLIT_NAMES}
    empty = [split for split, count in counts.items() if count == 0]
    if empty:
        split = empty[0]
        remedy = "Give more data" if split == "train" else f"Raise data.{split}_fraction, or give the task its own file"
        dropped = ", ".join(f"{count} {reason}" for reason, count in audit.dropped.items()) or "none"
        raise DataError(
            f"data: found no {split} record ({audit.rows_in} rows read; dropped: {dropped}; "
            f"train {counts['train']}, validation {counts['validation']}, test {counts['test']}); "
            f"expected at least one in each split. {remedy}."
        )
