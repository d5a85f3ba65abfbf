"""Answers arrive; how many of each task's show that generation itself broke leaves, whatever their score.

A tuned model can keep its loss and yet never end, repeat itself, or answer in another language or form.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keeptune.evaluation.metrics import DIVERGENCE, LOSS_METRICS, Answer
from keeptune.evaluation.words import plain, unicode_words

# An answer that ended by itself is no loop where it, or its repeated part, is shorter; one that was cut may be shorter.
_LEAST_LOOP_CHARACTERS, _LEAST_TAIL_CHARACTERS = 32, 24
_LEAST_CUT_CHARACTERS = 16
_LEAST_TIMES = 3
# Of an answer that was cut, so long a passage need stand there only twice.
_LONG_PASSAGE = 48
_MAX_LOOP_CHARACTERS = 4096
# An answer whose last words are few and follow each other in few ways loops without a fixed period.
_LEAST_WORDS, _LAST_WORDS = 12, 64
_MOST_DISTINCT_WORDS, _MOST_DISTINCT_PAIRS = 1 / 3, 1 / 2
_MOST_NEW_TRIPLES = 0.2
# Of a label that is shown.
_MAX_SHOWN = 80
_NUMBER = re.compile(r"[-+]?\d[\d.,]*")
# A quoted word or a formula is no change of language.
_OTHER_SCRIPT_SHARE = 0.2
# With so few references over so many records, a task is a choice among labels.
_MAX_LABELS, _LEAST_LABELLED_RECORDS = 20, 40


@dataclass(frozen=True, slots=True)
class Canaries:
    """How many of a task's answers are not ended, empty, loops, in another script or not in the references' form.

    `num_other_script` is None where no reference has a letter, `num_broken_format` where the references have no form in
    common: all JSON objects or arrays, or a few labels. Of a choice among labels, `top_answer` is the most frequent
    answer, given `num_top_answer` times and expected `num_top_expected` times; always giving the most frequent
    reference would be right `num_majority` times.
    """

    task: str
    num_records: int
    num_unended: int
    num_empty: int
    num_looping: int
    num_other_script: int | None
    num_broken_format: int | None
    format: Literal["json", "labels"] | None
    top_answer: str | None = None
    num_top_answer: int | None = None
    num_top_expected: int | None = None
    num_majority: int | None = None


def canaries(answers: Sequence[Answer]) -> dict[str, Canaries]:
    """Return each task's counts, in the order in which tasks come first.

    Answers that carry losses alone are left out: nothing was generated for them.
    """
    members: dict[str, list[Answer]] = {}
    for answer in answers:
        if set(answer.metrics) - {*LOSS_METRICS, DIVERGENCE}:
            members.setdefault(answer.task, []).append(answer)
    return {task: _canaries(task, mine) for task, mine in members.items()}


def _canaries(task: str, answers: Sequence[Answer]) -> Canaries:
    format_, num_broken = _broken_format(answers)
    return Canaries(
        task=task,
        num_records=len(answers),
        num_unended=sum(not answer.ended for answer in answers),
        num_empty=sum(not answer.prediction.strip() for answer in answers),
        num_looping=sum(_looping(answer) for answer in answers),
        num_other_script=_other_script(answers),
        num_broken_format=num_broken,
        format=format_,
        **(_labelled(answers) if format_ == "labels" else {}),
    )


def _labelled(answers: Sequence[Answer]) -> dict[str, Any]:
    given = Counter(plain(answer.prediction) for answer in answers)
    expected = Counter(label for answer in answers for label in {plain(text) for text in answer.references})
    top, number = given.most_common(1)[0]
    return {
        "top_answer": top[:_MAX_SHOWN],
        "num_top_answer": number,
        "num_top_expected": expected[top],
        "num_majority": max(expected.values()),
    }


def _looping(answer: Answer) -> bool:
    """Tell whether an answer loops and no reference does."""
    return loops(answer.prediction, ended=answer.ended) and not any(
        loops(reference, ended=answer.ended) for reference in answer.references
    )


def loops(text: str, *, ended: bool = True) -> bool:
    """Return whether a text repeats one phrase at its end, or, where it was cut, wanders among a few words.

    The phrase, of any length, stands there three times or more, up to the last tenth of the text, and takes up a
    quarter of it; without a letter or digit in it (a rule, a border of a table) half of it. Where `ended` is False the
    text was cut at the limit: then shorter texts are loops too, a long passage need stand there only twice, and it is
    enough that nearly all of the last words follow each other as they did before.

    Source: after Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), whose
    measure of repetition is the share of texts that end in a repeated phrase; for texts that were cut, the share of
    n-grams that stood there before, Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"
    (arXiv 1908.04319).
    """
    text = text.strip()[-_MAX_LOOP_CHARACTERS:]
    if len(text) < (_LEAST_LOOP_CHARACTERS if ended else _LEAST_CUT_CHARACTERS):
        return False
    if len(text) < 2 * _LEAST_LOOP_CHARACTERS and _NUMBER.fullmatch(text):
        return False
    # The space that a phrase ends with is there behind its last repetition too.
    return _repeats(f"{text} ", ended=ended) or (not ended and _wanders(unicode_words(text)))


def _repeats(text: str, *, ended: bool) -> bool:
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    least = _LEAST_TAIL_CHARACTERS if ended else _LEAST_CUT_CHARACTERS
    slack = len(text) // 10
    for period in range(1, len(text) // 2 + 1):
        times = 2 if period >= _LONG_PASSAGE and not ended else _LEAST_TIMES
        # A run of n matches with what stands a period before is a stretch of n + period characters.
        needed = max(times * period, len(text) // 4, least)
        if needed > len(text):
            break
        # Wherever in the last tenth the run ends, these characters before it match; few periods pass.
        probe = slice(len(text) - slack - min(8, needed - period - slack), len(text) - slack)
        if text[probe] != text[probe.start - period : probe.stop - period]:
            continue
        differs = np.flatnonzero(characters[period:] != characters[:-period])
        ends = np.append(differs, len(text) - period)
        matches = np.diff(ends, prepend=-1) - 1
        for end, number in zip(ends[::-1], matches[::-1], strict=True):
            if end + period < len(text) - slack:
                break
            phrase = text[end : end + period]
            worded = any(character.isalnum() for character in phrase)
            if number + period >= (needed if worded else max(needed, len(text) // 2)):
                return True
    return False


def _wanders(words: list[str]) -> bool:
    worded = [word for word in words if not word.isdecimal()]
    # Numbered repetitions count as repetitions; a text of numbers is judged by its numbers.
    words = worded if 3 * len(worded) >= 2 * len(words) else words
    if len(words) < _LEAST_WORDS:
        return False
    last = words[-_LAST_WORDS:]
    pairs = list(itertools.pairwise(last))
    few_words = len(set(last)) <= _MOST_DISTINCT_WORDS * len(last)
    if few_words and len(set(pairs)) <= _MOST_DISTINCT_PAIRS * len(pairs):
        return True
    triples = list(zip(words, words[1:], words[2:], strict=False))
    half = len(triples) // 2
    num_new = len(set(triples)) - len(set(triples[:half]))
    return num_new <= _MOST_NEW_TRIPLES * (len(triples) - half)


def _other_script(answers: Sequence[Answer]) -> int | None:
    scripts = {_script(letter) for a in answers for reference in a.references for letter in _letters(reference)}
    if not scripts:
        return None
    changed = 0
    for answer in answers:
        letters = _letters(answer.prediction)
        num_outside = sum(_script(letter) not in scripts for letter in letters)
        changed += num_outside > _OTHER_SCRIPT_SHARE * len(letters)
    return changed


def _letters(text: str) -> list[str]:
    return [character for character in text if character.isalpha()]


@functools.lru_cache(4096)
def _script(letter: str) -> str:
    """Return the script as the first word of the letter's Unicode name has it: LATIN, CYRILLIC, CJK, HIRAGANA …"""
    return unicodedata.name(letter, "").partition(" ")[0]


def _broken_format(answers: Sequence[Answer]) -> tuple[Literal["json", "labels"] | None, int | None]:
    if all(_is_json(reference) for answer in answers for reference in answer.references):
        return "json", sum(not _is_json(answer.prediction) for answer in answers)
    labels = {plain(reference) for answer in answers for reference in answer.references}
    if len(labels) <= _MAX_LABELS and len(answers) >= _LEAST_LABELLED_RECORDS:
        return "labels", sum(plain(answer.prediction) not in labels for answer in answers)
    return None, None


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or array; a bare number or word in quotes is as well plain text."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
