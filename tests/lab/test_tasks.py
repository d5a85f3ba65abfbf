"""Every answer of a task can be derived from its prompt and the world, and no split repeats what another holds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from keeptune.data.prepare import TaskSource, prepare_records
from keeptune.data.record import SPLIT_NAMES
from keeptune.lab.lexicon import ADJECTIVES, NOUNS, VERBS
from keeptune.lab.scenes import _BAD, _GOOD, _NOTES, CLOSINGS
from keeptune.lab.tasks import SPAN_SENTENCE, TASKS, LabTask, examples, write_task
from keeptune.lab.world import make_world
from keeptune.progress import Silent

WORLD = make_world()
ALL = {task.name: task for task in (*TASKS, SPAN_SENTENCE)}
FACTS = {fact.question: fact.answer for fact in WORLD.facts}
NUM_ROWS = 400


def rows(name: str, split: Any, number: int = NUM_ROWS) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs as the ordinary reader joins them."""
    return [_pair(row) for row in islice(examples(ALL[name], WORLD, split=split), number)]


def _pair(row: Any) -> tuple[str, str]:
    if "messages" in row:
        user, assistant = row["messages"]
        return user["content"], assistant["content"]
    return "\n".join(filter(None, [row["instruction"], row["input"]])), row["output"]


def _past(prompt: str) -> str:
    sentence = prompt.split("\n")[-1]
    verb = next(verb for verb in VERBS if f" {verb.present} " in sentence)
    return sentence.replace(f" {verb.present} ", f" {verb.past} ")


def _velli(prompt: str) -> str:
    words = prompt.split("\n")[-1].split(": ")[-1].rstrip(".").split(" ")
    place = [words[words.index("in") + 1], "na"] if "in" in words else []
    subject, verb_word = words[:2]
    verb, past = next((v, verb_word == v.past) for v in VERBS if verb_word in (v.present, v.past))
    thing = [word for word in words[2 : words.index("in") if "in" in words else None] if word != "the"]
    described = [NOUNS[thing[-1]], *(ADJECTIVES[word] for word in thing[:-1])]
    return " ".join([*place, subject, *described, verb.velli + ("ta" if past else "")]) + "."


def _sum(prompt: str) -> str:
    numbers = [word.strip("?.=: ") for word in prompt.replace("\n", " ").split() if word.strip("?.=: ").isdigit()]
    left, right = map(int, numbers)
    return str(left + right if " + " in prompt else left - right)


def _sorted(prompt: str) -> str:
    return ", ".join(sorted(prompt.split("\n")[-1].split(": ")[-1].split(", ")))


def _topic(prompt: str) -> str:
    def score(topic: str) -> int:
        return sum(text.split("{day}")[0] in prompt for text in _NOTES[topic])

    return max(_NOTES, key=score)


def _closed(prompt: str) -> str:
    return next(answer for question, answer in FACTS.items() if question in prompt)


DERIVED: dict[str, Callable[[str], str]] = {
    "tense": _past,
    "translation": _velli,
    "sums": _sum,
    "sorting": _sorted,
    "topic": _topic,
    "closed_book": _closed,
    "sentiment": lambda prompt: "positive" if any(text in prompt for text in _GOOD) else "negative",
    "letter_writer": lambda prompt: prompt.split("\n")[-1],
}


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_an_answer_follows_from_the_prompt(name: str, split: str) -> None:
    for prompt, answer in rows(name, split):
        assert DERIVED[name](prompt) == answer, prompt


def test_opinions_are_never_mixed() -> None:
    for prompt, _ in rows("sentiment", "train"):
        assert any(text in prompt for text in _GOOD) != any(text in prompt for text in _BAD)


# What answers a question, as a pattern with the answer in it; PAST stands for a verb in the past tense.
PAST = "|".join(verb.past for verb in VERBS)
ANSWERED: dict[str, str] = {
    rf"Who (?:{PAST}) the": rf"([A-Z]\w+) (?:{PAST}) the",
    r"What did \w+ \w+\?": rf"[A-Z]\w+ (?:{PAST}) (the [\w ]+) in [A-Z]",
    "Where did it happen": rf"(?:{PAST}) the [\w ]+ in ([A-Z]\w+)",
    "On which day did it happen": rf"(?:On|was on|It was) (\w+day)(?: \w+ (?:{PAST})|\.)",
    "Who helped": r"([A-Z]\w+) (?:helped|lent a hand)|The help of ([A-Z]\w+)",
    "How many coins did it cost": r"(\d+) coins",
    "In which town was the letter": r"I write to you from (\w+)",
    "On which day will they meet": r"(\w+day)(?: is (?:better|fine)|\.$| would be good)",
    "At which spot will they meet": r"(?:Better at|meet at|I will be at) the (\w+)",
    "In which town will they meet": r"(?:at the \w+) in (\w+)",
    "What will the two do": r"(?:we|I want to|time to|We could) (.+?)(?: together| in [A-Z]| with me| this week)",
    "Who asks first": r"\A(?:.*\n)*?(\w+):",
    "wrote|writer|Whose|Who is the .* from": r"([A-Z]\w+ [A-Z]\w+)$",
}


@pytest.mark.parametrize("name", ["span", "span_sentence"])
def test_the_answer_to_a_question_on_a_text_follows_from_the_text(name: str) -> None:
    seen = set()
    for prompt, answer in rows(name, "train", 1_500):
        lines = prompt.split("\n")
        asked = [(line, kind) for line in {*lines[:2], lines[-1]} for kind in ANSWERED if re.search(kind, line)]
        line, kind = next((line, kind) for line, kind in asked if ":" not in line)
        text = "\n".join(other for other in lines if other != line)
        found = [next(filter(None, match.groups())) for match in re.finditer(ANSWERED[kind], text, re.MULTILINE)]
        given = answer if name == "span" else re.sub(r"^It (happened (in|on)|cost) | helped| coins|\.$", "", answer)
        if name == "span_sentence" and kind.startswith(("Who (", "What did")):
            given, found = (
                answer,
                [f"{' '.join(m)}." for m in re.findall(rf"([A-Z]\w+ (?:{PAST})) (the [\w ]+) in [A-Z]", text)],
            )
        assert given in found, (prompt, answer, found)
        seen.add(kind)
    assert len(seen) == (13 if name == "span" else 6)


def test_the_name_under_a_text_is_its_writer() -> None:
    asked = [pair for pair in rows("span", "train") if re.search("wrote|Whose|writer|Who is the .* from", pair[0])]
    assert len(asked) > 50
    for prompt, answer in asked:
        assert answer in prompt.split("\n")[-2:]


def test_no_question_of_a_trained_task_asks_for_the_writer_of_a_letter() -> None:
    letters = [
        pair for pair in rows("span", "train") if re.search(r"^(Dear|Hello|My dear) \w+,$", pair[0], re.MULTILINE)
    ]
    assert len(letters) > 50
    for prompt, answer in letters:
        lines = prompt.split("\n")
        assert answer != next(after for line, after in pairwise(lines) if line in CLOSINGS)


def test_people_and_places_are_those_of_the_sentence() -> None:
    for prompt, answer in rows("names", "train"):
        people, places = (part.split(": ")[1].split(", ") for part in answer.split("; "))
        assert all(name in prompt for name in (*people, *places))
        assert set(people) <= {person.name for person in WORLD.people}
        assert set(places) <= {place.name for place in WORLD.places}


def test_a_summary_holds_what_the_two_agreed_on_or_what_was_done() -> None:
    kinds = {True: 0, False: 0}
    for prompt, answer in rows("summary", "train"):
        agreed = " will meet at the " in answer
        kinds[agreed] += 1
        if not agreed:
            assert answer in prompt
            continue
        first, second = answer.split(" will meet")[0].split(" and ")
        place, day = answer.split(" in ")[1].split(" on ")
        assert all(text in prompt for text in (f"{first}:", f"{second}:", place, day.split(" to ")[0]))
    assert min(kinds.values()) > 100


def test_a_headline_is_what_was_done_in_the_present_tense() -> None:
    for prompt, answer in rows("headline", "train"):
        verb = next(verb for verb in VERBS if f" {verb.present} " in answer)
        assert answer.replace(f" {verb.present} ", f" {verb.past} ") in prompt


@pytest.mark.parametrize("name", ALL)
def test_a_task_always_writes_the_same_rows(name: str) -> None:
    text = json.dumps([rows(name, split, 100) for split in SPLIT_NAMES])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == HASHES[name]


@pytest.mark.parametrize("task", ALL.values(), ids=list(ALL))
def test_no_prompt_stands_twice_or_in_two_splits(task: LabTask) -> None:
    prompts = {split: [prompt for prompt, _ in rows(task.name, split)] for split in SPLIT_NAMES}
    assert sum(len(set(part)) for part in prompts.values()) == sum(len(part) for part in prompts.values())
    assert len({prompt for part in prompts.values() for prompt in part}) == sum(len(part) for part in prompts.values())


@pytest.mark.parametrize("task", ALL.values(), ids=list(ALL))
def test_two_wordings_are_for_validation_and_test_alone(task: LabTask) -> None:
    def shown(wording: str, prompt: str) -> bool:
        return all(part in prompt for part in re.split(r"\{\w*\}", wording))

    others = [
        wording for wording in task.wordings[-2:] if not any(shown(wording, known) for known in task.wordings[:-2])
    ]
    train = [prompt.split("\n")[0] for prompt, _ in rows(task.name, "train")]
    test = [prompt.split("\n")[0] for prompt, _ in rows(task.name, "test")]
    for wording in others:
        opening = wording.split("{")[0]
        if wording != "{}":
            assert not any(prompt.startswith(opening) and shown(wording, prompt) for prompt in train)
            assert any(shown(wording, prompt) for prompt in test)


def test_closed_book_test_questions_are_about_subjects_that_train_never_asks_for() -> None:
    asked = {split: {_subject(prompt) for prompt, _ in rows("closed_book", split, 3_000)} for split in SPLIT_NAMES}
    assert len(asked["test"]) > 20
    assert not asked["test"] & asked["train"] and not asked["validation"] & asked["train"]


def _subject(prompt: str) -> str:
    return next(fact.about for fact in WORLD.facts if fact.question in prompt)


def test_sums_of_test_are_not_in_train() -> None:
    pairs = {split: _number_pairs(split) for split in SPLIT_NAMES}
    assert min(len(pairs["train"]), len(pairs["test"])) > 300
    assert not pairs["test"] & pairs["train"] and not pairs["validation"] & pairs["train"]


def _number_pairs(split: str) -> set[tuple[str, ...]]:
    return {tuple(sorted(re.findall(r"\d+", prompt))) for prompt, _ in rows("sums", split)}


def test_there_are_ten_tasks_and_two_that_are_held_out() -> None:
    assert [sum(not task.held_out for task in TASKS), sum(task.held_out for task in TASKS)] == [10, 2]
    assert {task.format for task in TASKS} == {"alpaca", "messages"}
    assert all(len(set(task.wordings)) == len(task.wordings) >= 8 for task in ALL.values())


def test_the_ordinary_reader_takes_the_rows(tmp_path: Path) -> None:
    counts = {"train": 60, "validation": 10, "test": 20}
    for task in ALL.values():
        write_task(task, WORLD, tmp_path / task.name, counts=counts)  # pyright: ignore
    prepared = prepare_records(
        [TaskSource(name, path=str(tmp_path / name)) for name in ALL],
        seed=0,
        validation_fraction=0.1,
        test_fraction=0.1,
        drop_incomplete=False,
        duplicates="drop",
        leaks="keep",
        progress=Silent(),
        scratch=tmp_path,
    )
    assert {split: len(prepared.records[split]) for split in SPLIT_NAMES} == {
        split: 13 * count for split, count in counts.items()
    }


HASHES = {
    "summary": "867b1bba058c",
    "sentiment": "2240337c5e4a",
    "topic": "5fd67aad87bb",
    "span": "7b353f628b62",
    "closed_book": "bc69d4b348e2",
    "names": "fd528d8a971c",
    "translation": "c730f15ac151",
    "sums": "3862e20efc34",
    "tense": "2a56758f6053",
    "sorting": "6a05c4df5f69",
    "headline": "9e16c2b75719",
    "letter_writer": "ad54116f89f1",
    "span_sentence": "b86594d4052a",
}
