"""Count completions where a task has few different ones, its class labels, and find spellings of one label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from keeptune.data.ngrams import normalised

_MAX_CHARACTERS = 60
_MAX_DIFFERENT = 1000
_RECORDS_PER_LABEL = 3


class LabelCounts:
    """How often each completion of a task was met, as long as all are short and at most 1,000 differ."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._is_open = True

    def add(self, completion: str) -> None:
        """Count a completion."""
        if not self._is_open:
            return
        self._counts[completion] += 1
        if len(completion) > _MAX_CHARACTERS or len(self._counts) > _MAX_DIFFERENT:
            self._counts.clear()
            self._is_open = False

    @property
    def counts(self) -> Mapping[str, int]:
        """The labels, the most frequent first; none where completions are no labels, as most of them differ."""
        total = self._counts.total()
        return dict(self._counts.most_common()) if total >= _RECORDS_PER_LABEL * len(self._counts) else {}

    def spellings(self) -> list[Mapping[str, int]]:
        """Return the labels that differ in case or white space alone, each group with its counts."""
        groups: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for label, count in self.counts.items():
            groups[normalised(label)][label] = count
        return [group for group in groups.values() if len(group) > 1]

    def are_numbers(self) -> bool:
        """Tell whether the labels are whole numbers that follow one another from 0 or 1 on."""
        if len(self.counts) < 2 or not all(label.isascii() and label.isdecimal() for label in self.counts):
            return False
        numbers = sorted(map(int, self.counts))
        return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
