"""Count which references a metric can read, refuse metrics that are blind to a task's, and say what else misleads.

rouge_score keeps the letters a to z and digits alone: of a Chinese text nothing is left, and every answer scores 0.
BLEU and SQuAD's F1 split words at spaces: a text without spaces is one word, right as a whole or wrong as a whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import regex

from keeptune.evaluation.corpus import BLEU_ORDER, BLEU_TOKENISERS
from keeptune.evaluation.metrics import METRICS, Reads
from keeptune.evaluation.words import CHINESE, JAPANESE, UNSPACED, written_words

# A metric may be blind to this share of a task's references at most, and is remarked upon from that share of damaged
# ones on.
_MOST_BLIND, _LEAST_DAMAGED = 0.1, 0.05
# References this short are common enough from this share on for BLEU to mislead.
_LEAST_SHORT = 0.5
_MAX_CHARACTERS = 2000
_MAX_SHOWN = 24
# A word of which the metric sees less than all, or that it does not tell apart from its neighbours.
_DAMAGED: Mapping[Reads, regex.Pattern[str] | None] = {
    "ascii": regex.compile(r"[^\x00-\x7f]"),
    "words": None,
    "spaced": regex.compile(rf"[{UNSPACED}]"),
    "chinese": regex.compile(rf"(?V1)[[{UNSPACED}]--[{CHINESE}]]"),
    "japanese": regex.compile(rf"(?V1)[[{UNSPACED}]--[{JAPANESE}]]"),
}
_NEED_WORDS = ("ascii", "words")
_SEEN: Mapping[Reads, str] = {
    "ascii": "only the letters a to z and digits",
    "words": "only letters and digits",
    "spaced": "only words between spaces",
    "chinese": "only words between spaces and single Chinese characters",
    "japanese": "only words between spaces and Japanese words",
}
_BLIND: Mapping[Reads, str] = {
    "ascii": "lose most of their words",
    "words": "have no letter and no digit",
    **dict.fromkeys(("spaced", "chinese", "japanese"), "are not split into words"),
}
_OUTSIDE_WORDS = re.compile(r"[^\w\s]")
# These split every text into pieces smaller than words.
_SPLITS_WORDS = ("bleu_char", "bleu_flores200")


class References:
    """Counts of references by task: how many there are, and how many of them each kind of metric cannot read."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._blind: dict[str, dict[Reads, Counter[str]]] = {}
        self._examples: dict[tuple[str, Reads], str] = {}

    def add(self, task: str, text: str) -> None:
        """Count a reference; of a long one, its beginning."""
        counts = self._counts.setdefault(task, Counter())
        text = text[:_MAX_CHARACTERS]
        counts["num_references"] += 1
        words = written_words(text)
        counts["num_short"] += len(words) + len(_OUTSIDE_WORDS.findall(text)) < BLEU_ORDER
        if words and text.isascii():
            return
        for reads in get_args(Reads):
            pattern = _DAMAGED[reads]
            damaged = [word for word in words if pattern is not None and pattern.search(word)]
            blind = 2 * len(damaged) > len(words) or (not words and bool(text.strip()) and reads in _NEED_WORDS)
            if damaged or blind:
                of_task = self._blind.setdefault(task, {}).setdefault(reads, Counter())
                of_task.update(num_blind=int(blind), num_damaged=1)
                if blind or (task, reads) not in self._examples:
                    self._examples.setdefault((task, reads), text.strip() if blind else damaged[0])

    def to_json(self) -> dict[str, Any]:
        """Return the counts as `audit.json` holds them, task by task."""
        return {
            task: {
                "num_references": counts["num_references"],
                "num_short": counts["num_short"],
                "unread": {
                    reads: {**of_kind, "example": self._examples[task, reads]}
                    for reads, of_kind in self._blind.get(task, {}).items()
                },
            }
            for task, counts in self._counts.items()
        }


def blind_problems(metrics: Sequence[str], references: Mapping[str, Any]) -> list[str]:
    """Return `found; expected. remedy` for the metrics that cannot read more than a tenth of some task's references.

    `references` is what `References.to_json` returned.
    """
    problems = []
    for reads, names in _by_kind(metrics).items():
        tasks = [
            f"{task} ({_share(of_task, reads, 'num_blind')} {_BLIND[reads]}, such as {_example(of_task, reads)})"
            for task, of_task in references.items()
            if _count(of_task, reads, "num_blind") > _MOST_BLIND * of_task["num_references"]
        ]
        if tasks:
            wordless = any(
                _count(of_task, "words", "num_blind") > _MOST_BLIND * of_task["num_references"]
                for of_task in references.values()
            )
            problems.append(
                f"found {', '.join(names)}, which {_sees(names)} {_SEEN[reads]}, for {', '.join(tasks)}; expected "
                f"metrics that read them. Use {_instead(names, wordless=wordless)}."
            )
    return problems


def remarks(metrics: Sequence[str], references: Mapping[str, Any]) -> list[str]:
    """Return sentences on metrics that can be used for a task and yet say less than they seem to."""
    found = []
    for reads, names in _by_kind(metrics).items():
        for task, of_task in references.items():
            damaged, blind = (_count(of_task, reads, kind) for kind in ("num_damaged", "num_blind"))
            if blind or damaged > _LEAST_DAMAGED * of_task["num_references"]:
                found.append(
                    f"{', '.join(names)} {_sees(names)} {_SEEN[reads]}: {_share(of_task, reads, 'num_damaged')} of "
                    f"{task} have other words, such as {_example(of_task, reads)}. To count these, use "
                    f"{_instead(names)}."
                )
    bleu = [name for name in metrics if name in BLEU_TOKENISERS and name not in _SPLITS_WORDS]
    for task, of_task in references.items() if bleu else ():
        if of_task["num_short"] >= _LEAST_SHORT * of_task["num_references"]:
            found.append(
                f"{', '.join(bleu)}: {of_task['num_short']:,} of {of_task['num_references']:,} references of {task} "
                f"have fewer than {BLEU_ORDER} words. BLEU counts runs of {BLEU_ORDER} words, and can be 0 where every "
                "answer is right; exact_match and chrf suit short answers."
            )
    return found


def _by_kind(metrics: Sequence[str]) -> dict[Reads, list[str]]:
    kinds: dict[Reads, list[str]] = {}
    for name in dict.fromkeys(metrics):
        reads = METRICS[name].reads
        if reads is not None:
            kinds.setdefault(reads, []).append(name)
    return kinds


def _count(of_task: Mapping[str, Any], reads: Reads, kind: str) -> int:
    return of_task["unread"].get(reads, {}).get(kind, 0)


def _share(of_task: Mapping[str, Any], reads: Reads, kind: str) -> str:
    return f"{_count(of_task, reads, kind):,} of {of_task['num_references']:,} references"


def _example(of_task: Mapping[str, Any], reads: Reads) -> str:
    text = " ".join(of_task["unread"][reads]["example"].split())
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…")


def _sees(names: Sequence[str]) -> str:
    return "sees" if len(names) == 1 else "see"


def _instead(names: Sequence[str], *, wordless: bool = False) -> str:
    """Return what reads the same references, in the order of `names`; chrF reads every text."""
    found = []
    for name in names:
        if f"{name}_unicode" in METRICS and not wordless:
            found += [f"{name}_unicode", "char_f1"]
        elif name == "token_f1":
            found.append("char_f1")
        elif name in BLEU_TOKENISERS:
            found += ["bleu_zh for Chinese", "bleu_ja_mecab for Japanese", "bleu_char", "bleu_flores200"]
        else:
            found.append("exact_match")
    found = [one for one in sorted(dict.fromkeys(found), key="char_f1".__eq__) if one.partition(" ")[0] not in names]
    return f"{', '.join(found)} or chrf" if found else "chrf"
