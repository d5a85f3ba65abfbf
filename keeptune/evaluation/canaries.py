"""Answers arrive; how many of each task's show that generation itself broke leaves, whatever their score.

A tuned model can keep its loss and yet never end, repeat itself, or answer in another language or form.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keeptune.evaluation.metrics import DIVERGENCE, LOSS_METRICS, Answer, squad_normalised

# Shorter answers are never called a loop, and no shorter end of an answer makes one.
_LEAST_LOOP_CHARACTERS = 32
_LEAST_TAIL_CHARACTERS = 24
_LEAST_TIMES = 3
# A quoted word or a formula is no change of language.
_OTHER_SCRIPT_SHARE = 0.2
# With so few references over so many records, a task is a choice among labels.
_MAX_LABELS, _LEAST_LABELLED_RECORDS = 20, 40


@dataclass(frozen=True, slots=True)
class Canaries:
    """How many of a task's answers are not ended, empty, loops, in another script or not in the references' form.

    `num_other_script` is None where no reference has a letter, `num_broken_format` where the references have no form in
    common: all JSON objects or arrays, or a few labels.
    """

    task: str
    num_records: int
    num_unended: int
    num_empty: int
    num_looping: int
    num_other_script: int | None
    num_broken_format: int | None
    format: Literal["json", "labels"] | None


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
        num_looping=sum(loops(a.prediction) and not any(map(loops, a.references)) for a in answers),
        num_other_script=_other_script(answers),
        num_broken_format=num_broken,
        format=format_,
    )


def loops(text: str) -> bool:
    """Return whether a text ends in one phrase, three times or more, that takes up its last quarter at least.

    Source: after Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), whose
    measure of repetition is the share of texts that end in a repeated phrase.
    """
    text = text.strip()
    if len(text) < _LEAST_LOOP_CHARACTERS:
        return False
    for period in range(1, len(text) // _LEAST_TIMES + 1):
        tail = text[-max(_LEAST_TIMES * period, len(text) // 4, _LEAST_TAIL_CHARACTERS) :]
        if tail[period:] == tail[:-period]:
            return True
    return False


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
    labels = {squad_normalised(reference) for answer in answers for reference in answer.references}
    if len(labels) <= _MAX_LABELS and len(answers) >= _LEAST_LABELLED_RECORDS:
        return "labels", sum(squad_normalised(answer.prediction) not in labels for answer in answers)
    return None, None


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or array; a bare number or word in quotes is as well plain text."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
