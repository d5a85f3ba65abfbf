"""Splits: a recipe arrives; records, tokens and audit of every split leave, in one folder."""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    open_table,
    rendering,
    require_embeddings,
)
from keeptune.stages.parts import divided
from keeptune.storage import storage_errors, write_json, write_lines

if TYPE_CHECKING:
    from keeptune.data.audit import Audit
    from keeptune.data.disk import Records
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
        fates: dict[SplitName | PartName, _Fates] = {
            split: _write_split(recipe, base, folder, split=split, records=records, progress=progress)
            for split, records in divided(recipe, prepared).items()
        }
    audit = _with_tokens(prepared.audit, folder, fates=fates)
    _require_every_split(audit)
    for task, counts in audit.tasks.items():
        wanted = ("test",) if task in audit.untrained_tasks else SPLIT_NAMES
        empty = [split for split in wanted if not getattr(counts, split)]
        if empty:
            progress.say(f"{task}: no record in {' and '.join(empty)}; it is not scored there")
    progress.say(audit.summary())
    write_json(folder / "audit.json", audit.to_json())
    return audit


@dataclass(frozen=True, slots=True)
class _Fates:
    """What became of the records of a split, in their order: the task of each, and whether it is kept."""

    tasks: list[str]
    numbers: array[int]
    kept: array[int]

    def counts(self, *, kept: bool) -> Counter[str]:
        """Return how many records of each task were kept, or dropped for their length."""
        return Counter(self.tasks[i] for i, stays in zip(self.numbers, self.kept, strict=True) if stays == kept)


def _write_split(
    recipe: Recipe, base: Base, folder: Path, *, split: SplitName | PartName, records: Records, progress: Progress
) -> _Fates:
    """Write the tokens and the records of a split; return what became of each record."""
    from keeptune.data.heap import give_back_freed
    from keeptune.text.table import TokenTable
    from keeptune.text.tokens import tokenize

    progress.start(f"Tokenising {split}", total=len(records), unit="records")
    limits = {**length_policy(recipe, base), "max_positions": max_positions(recipe, base)}
    numbers: dict[str, int] = {}
    task_numbers, kept = array("i"), array("b")

    def noted(items: Iterable[Tokenized]) -> Iterator[Tokenized]:
        for item in items:
            progress.advance()
            task_numbers.append(numbers.setdefault(item.record.task, len(numbers)))
            kept.append(item.example is not None)
            yield item

    tokenized = tokenize(records, **rendering(recipe, base), **limits)
    table = TokenTable.write(folder / "tokens" / f"{split}.arrow", noted(tokenized))
    progress.finish()
    give_back_freed()
    require_embeddings(table, base=base)
    write_lines(folder / f"{split}.jsonl", itertools.compress(records.lines(), kept))
    return _Fates(list(numbers), task_numbers, kept)


def _with_tokens(audit: Audit, folder: Path, *, fates: Mapping[SplitName | PartName, _Fates]) -> Audit:
    """Return the audit with its token part and what was dropped for its length."""
    import numpy as np

    from keeptune.data.audit import token_audit

    tables = {split: open_table(folder, split) for split in fates}
    too_long: Counter[tuple[str, SplitName | PartName]] = Counter()
    parts: dict[str, dict[PartName, int]] = {}
    untrained = [np.zeros(0, np.int64)]
    for split, fate in fates.items():
        too_long.update({(task, split): number for task, number in fate.counts(kept=False).items()})
        is_untrained = np.array([task in audit.untrained_tasks for task in fate.tasks], np.bool_)
        numbers = np.array(fate.numbers)[np.array(fate.kept, np.bool_)]
        untrained.append(tables[split].completion_lengths[is_untrained[numbers]])
    for part in PART_NAMES:
        for task, number in fates[part].counts(kept=True).items() if part in fates else ():
            parts.setdefault(task, {})[part] = number
    counts = [table.counts for table in tables.values()]
    tokens = token_audit(
        np.concatenate([table.prompt_lengths for table in tables.values()]),
        np.concatenate([table.completion_lengths for table in tables.values()]),
        truncated=sum(count.num_truncated for count in counts),
        completion_cut=sum(count.num_completions_cut for count in counts),
        too_long=sum(count.num_dropped for count in counts),
        supervised_tokens=sum(count.num_targets for count in counts),
        untrained_completion_tokens=np.concatenate(untrained),
    )
    return audit.with_tokens(tokens, too_long=too_long, parts=parts)


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
