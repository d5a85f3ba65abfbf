"""Counts of what happened to the rows arrive; an `Audit` whose sums are checked leaves, for `audit.json`."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from keeptune.data.group_audit import GroupAudit
from keeptune.data.leak_audit import LeakAudit
from keeptune.data.leaks import LeakKind
from keeptune.data.record import PART_NAMES, SPLIT_NAMES, PartName, SplitName

TOO_LONG = "too_long"
# Rows that the recipe does not ask for; every other reason takes out a row that was asked for.
_UNUSED = frozenset({"max_records", "not_trained"})
_REASONS = {
    "exact_duplicate": "exact copies",
    "leak": "overlaps of train with validation or test",
    "max_records": "above max_records",
    "not_trained": "non-test rows of tasks not trained on",
    TOO_LONG: "longer than max_length",
}


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Token counts: the least value that is not less than 50, 90 or 99 % of them, the largest, the mean."""

    p50: int
    p90: int
    p99: int
    max: int
    mean: float


@dataclass(frozen=True, slots=True)
class TokenAudit:
    """Lengths in tokens and what the length policy did.

    `truncated` kept records lost tokens of their prompt or completion, `completion_cut` of them of their completion;
    `too_long` were dropped; `supervised_tokens` carry loss. `untrained_completion` holds the test completions of the
    tasks that are not trained on, None where there are none.
    """

    prompt: Quantiles
    completion: Quantiles
    total: Quantiles
    truncated: int
    completion_cut: int
    too_long: int
    supervised_tokens: int
    untrained_completion: Quantiles | None = None


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Records of each split."""

    train: int = 0
    validation: int = 0
    test: int = 0

    @property
    def total(self) -> int:
        """The sum over the splits."""
        return self.train + self.validation + self.test


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """Where a dropped row stood, and why it was dropped."""

    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two near-duplicate prompts by the origins of their records, and how alike they are beside template wording."""

    first: str
    second: str
    jaccard: float


@dataclass(frozen=True, slots=True)
class NearAudit:
    """Links that join different near-duplicate prompts, n - 1 for a group of n, and the first 20 of them."""

    num_pairs: int
    examples: tuple[NearPair, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """What became of every row: `rows_in` = `kept` + the sum of `dropped`, by reason.

    `exact_duplicates` counts copies, dropped or not; `tasks` the kept records, those of `untrained_tasks` all in test.
    `parts` says how many of these were set aside from the report, task by task. `remarks` are sentences for the user;
    `unread_columns` counts, by task, the rows that have something in a column that no record is made of. `tokens` is
    None until they are counted.
    """

    rows_in: int
    kept: int
    dropped: Mapping[str, int]
    dropped_rows: tuple[DroppedRow, ...]
    exact_duplicates: int
    near_duplicates: NearAudit
    groups: GroupAudit
    tasks: Mapping[str, SplitCounts]
    leaks: Mapping[LeakKind, LeakAudit]
    untrained_tasks: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    unread_columns: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[PartName, int]] = field(default_factory=dict)
    tokens: TokenAudit | None = None

    def __post_init__(self) -> None:
        assert self.rows_in == self.kept + sum(self.dropped.values()), "rows_in = kept + dropped"
        assert self.kept == sum(counts.total for counts in self.tasks.values()), "kept = the sum over tasks and splits"
        assert self.tokens is None or self.dropped.get(TOO_LONG, 0) == self.tokens.too_long, "too_long is counted once"

    @property
    def splits(self) -> SplitCounts:
        """The kept records of each split, over all tasks."""
        return _sum(self.tasks.values())

    @property
    def trained_splits(self) -> SplitCounts:
        """The kept records of each split, over the tasks that are trained on."""
        return _sum(counts for task, counts in self.tasks.items() if task not in self.untrained_tasks)

    def with_tokens(
        self,
        tokens: TokenAudit,
        *,
        too_long: Mapping[tuple[str, SplitName | PartName], int],
        parts: Mapping[str, Mapping[PartName, int]] | None = None,
    ) -> Audit:
        """Return the audit with the token part.

        `too_long` counts the records dropped for length by task and split or part, `parts` what is left.
        """
        fewer: Counter[tuple[str, str]] = Counter()
        for (task, split), number in too_long.items():
            fewer[task, "test" if split in PART_NAMES else split] += number
        num_too_long = fewer.total()
        tasks = {
            task: SplitCounts(*(getattr(counts, split) - fewer[task, split] for split in SPLIT_NAMES))
            for task, counts in self.tasks.items()
        }
        dropped = {**self.dropped, TOO_LONG: num_too_long} if num_too_long else self.dropped
        kept = self.kept - num_too_long
        return replace(self, kept=kept, dropped=dropped, tasks=tasks, parts=parts or {}, tokens=tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the audit as `audit.json` holds it.

        Beside the fields stand `splits` and, where tokens are counted, `kept_whole` and `truncated`, so that
        rows_in = kept_whole + truncated + the sum of dropped.
        """
        value = asdict(self) | {"splits": asdict(self.splits)}
        if self.tokens is not None:
            value |= {"kept_whole": self.kept - self.tokens.truncated, "truncated": self.tokens.truncated}
            value["tokens"] |= {"truncated_fraction": self.tokens.truncated / max(self.kept, 1)}
        return value

    def counts(self) -> dict[str, Any]:
        """Return what became of the rows, as manifests hold it: rows_in = kept_whole + truncated + all of dropped."""
        names = ("rows_in", "kept_whole", "truncated", "dropped", "splits")
        value = self.to_json()
        return {name: value[name] for name in names if name in value}

    def summary(self) -> str:
        """Return the sum of rows as one line."""
        truncated = self.tokens.truncated if self.tokens is not None else 0
        terms = [f"{self.kept:,} kept" + (f" ({truncated:,} of them truncated)" if truncated else "")]
        for name, counts in zip(("not used", "removed"), unused_and_removed(self.dropped), strict=True):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
            terms += [f"{sum(counts.values()):,} {name} ({reasons})"] if counts else []
        return f"{self.rows_in:,} rows = {' + '.join(terms)}"


def unused_and_removed(dropped: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many rows were not asked for, and how many were taken out, each by its reason in words."""
    unused, removed = {}, {}
    for reason, count in sorted(dropped.items()):
        counts = unused if reason in _UNUSED else removed
        counts[_REASONS.get(reason, reason.replace("_", " "))] = count
    return unused, removed


def _sum(tasks: Iterable[SplitCounts]) -> SplitCounts:
    parts = list(tasks)
    return SplitCounts(*(sum(getattr(counts, split) for counts in parts) for split in SPLIT_NAMES))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many records have how many tokens, before any cut: in the prompt, in the completion, in both.

    `untrained_completion` counts the records of tasks that are not trained on once more.
    """

    prompt: Counter[int] = field(default_factory=Counter[int])
    completion: Counter[int] = field(default_factory=Counter[int])
    total: Counter[int] = field(default_factory=Counter[int])
    untrained_completion: Counter[int] = field(default_factory=Counter[int])

    def add(self, prompt_tokens: int, completion_tokens: int, *, trained: bool = True) -> None:
        """Count a record."""
        self.prompt[prompt_tokens] += 1
        self.completion[completion_tokens] += 1
        self.total[prompt_tokens + completion_tokens] += 1
        if not trained:
            self.untrained_completion[completion_tokens] += 1


def quantiles(counts: Mapping[int, int]) -> Quantiles:
    """Return the quantiles of token counts, given how often each occurs; all are 0 where there are none."""
    number = sum(counts.values())
    if not number:
        return Quantiles(0, 0, 0, 0, 0.0)
    ascending = sorted(counts)
    ends = list(itertools.accumulate(counts[value] for value in ascending))
    p50, p90, p99 = (ascending[bisect.bisect_left(ends, math.ceil(q * number))] for q in (0.5, 0.9, 0.99))
    mean = sum(value * count for value, count in counts.items()) / number
    return Quantiles(p50, p90, p99, ascending[-1], mean)


def token_audit(
    lengths: Lengths, *, truncated: int, completion_cut: int, too_long: int, supervised_tokens: int
) -> TokenAudit:
    """Return the token part of an audit from the lengths of the records that are kept."""
    untrained = lengths.untrained_completion
    return TokenAudit(
        prompt=quantiles(lengths.prompt),
        completion=quantiles(lengths.completion),
        total=quantiles(lengths.total),
        truncated=truncated,
        completion_cut=completion_cut,
        too_long=too_long,
        supervised_tokens=supervised_tokens,
        untrained_completion=quantiles(untrained) if untrained else None,
    )


def split_counts(placed: Iterable[tuple[str, SplitName]], *, tasks: Iterable[str]) -> dict[str, SplitCounts]:
    """Return the counts of each of the tasks from the (task, split) of every record."""
    counts = Counter(placed)
    return {task: SplitCounts(*(counts[task, split] for split in SPLIT_NAMES)) for task in tasks}
