"""Count the overlaps of train with validation and test by kind, with examples, for the audit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from keeptune.data.leaks import LEAK_KINDS, LeakKind
from keeptune.data.ngrams import normalised, words
from keeptune.data.record import Record, SplitName

MAX_EXAMPLES = 20
_MAX_WORDS = 1000
_MAX_SHOWN = 160
# Wording of a few words stands in many texts: what is shared then is sought elsewhere too.
_FEW_WORDS = 6


@dataclass(frozen=True, slots=True)
class LeakExample:
    """A train record that overlaps with a held-out one, by their origins, and the longest run of words in both.

    `overlap_fraction` is that of `Leaks`.
    """

    train: str
    held_out: str
    split: SplitName
    overlap_fraction: float
    shared: str = ""


@dataclass(frozen=True, slots=True)
class LeakAudit:
    """Train records of one kind of overlap, how many of them were removed, and the first 20."""

    num_train_records: int
    num_removed: int
    examples: tuple[LeakExample, ...]


def leak_audits(
    counts: Mapping[LeakKind, int],
    examples: Iterable[tuple[LeakKind, LeakExample]],
    *,
    removed: Mapping[LeakKind, int],
) -> dict[LeakKind, LeakAudit]:
    """Return the audit of each kind of overlap, those without any included, from their counts, how many of them were
    removed, and some examples."""
    by_kind: dict[LeakKind, list[LeakExample]] = {kind: [] for kind in LEAK_KINDS}
    for kind, example in examples:
        by_kind[kind].append(example)
    return {
        kind: LeakAudit(number, removed.get(kind, 0), tuple(shown[:MAX_EXAMPLES]))
        for kind, shown in by_kind.items()
        for number in [counts.get(kind, 0)]
    }


def shared_words(first: Record, second: Record) -> str:
    """Return the longest run of words that two prompts or completions, or else one of each, share, cut to be shown."""
    same = [(first.prompt, second.prompt), (first.completion, second.completion)]
    crossed = [(first.prompt, second.completion), (first.completion, second.prompt)]
    text = max((_longest_run(*texts) for texts in same), key=len)
    if len(text.split()) < _FEW_WORDS:
        text = max([text, *(_longest_run(*texts) for texts in crossed)], key=len)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN].rsplit(' ', 1)[0]} …"


def _longest_run(first: str, second: str) -> str:
    ours, theirs = (words(normalised(text))[:_MAX_WORDS] for text in (first, second))
    match = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match()
    return " ".join(ours[match.a : match.a + match.size])
