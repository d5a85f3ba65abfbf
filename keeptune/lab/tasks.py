"""A world and a seed arrive, instruction rows with known answers leave, in the ordinary formats.

What a task holds back from train: each of its examples has a key (a fact's subject, a pair of numbers, a set of words
…), and the hash of that key alone says in which split every example with that key is. Two of each task's wordings are
for validation and test alone, and used there in half of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

from keeptune.data.record import SPLIT_NAMES, SplitName
from keeptune.lab.lexicon import NOUNS, TOPICS
from keeptune.lab.scenes import (
    CLOSINGS,
    make_clause,
    make_errand,
    make_letter,
    make_meeting,
    make_note,
    make_review,
    sum_text,
    visit,
)
from keeptune.lab.wordings import WORDINGS
from keeptune.lab.world import World
from keeptune.storage import write_jsonl

# Of 100 keys: those below the first bound are test, those below the second validation.
_TEST_BELOW, _VALIDATION_BELOW = 15, 30
_NUM_HELD_OUT_WORDINGS = 2


@dataclass(frozen=True, slots=True)
class Made:
    """One example before it is worded: `key` decides its split, `kind` says what the input is."""

    key: str
    input: str
    answer: str
    kind: str = ""


# The key, a text, and questions on it, each with its answer.
Passage = tuple[str, str, Sequence[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class LabTask:
    """A task of the lab, with its instructions and the metric by which it is judged."""

    name: str
    make: Callable[[Random, World], Made]
    wordings: tuple[str, ...]
    metric: str
    format: Literal["alpaca", "messages"]
    held_out: bool = False

    @property
    def train_wordings(self) -> tuple[str, ...]:
        return self.wordings[:-_NUM_HELD_OUT_WORDINGS]


def key_split(task: str, key: str) -> SplitName:
    """Return the split of every example of a task with this key."""
    place = int(hashlib.sha256(f"{task}\n{key}".encode()).hexdigest(), 16) % 100
    return "test" if place < _TEST_BELOW else "validation" if place < _VALIDATION_BELOW else "train"


def examples(task: LabTask, world: World, *, split: SplitName, seed: int = 0) -> Iterator[dict[str, object]]:
    """Yield distinct rows of a task without end (as long as it has more), always the same ones."""
    rng = Random(f"{task.name} {split} {seed}")
    seen: set[str] = set()
    num_repeats = 0
    while num_repeats < 1_000:
        made = task.make(rng, world)
        if key_split(task.name, made.key) != split:
            continue
        wordings = task.train_wordings
        if split != "train" and rng.random() < 0.5:
            wordings = task.wordings[-_NUM_HELD_OUT_WORDINGS:]
        wording = rng.choice(wordings)
        text = f"{wording}\n{made.input}"
        if text in seen:
            num_repeats += 1
            continue
        num_repeats = 0
        seen.add(text)
        yield _row(wording, made, task.format)


def write_task(task: LabTask, world: World, folder: Path, *, counts: Mapping[SplitName, int], seed: int = 0) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` with at most that many rows each into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLIT_NAMES:
        rows = examples(task, world, split=split, seed=seed)
        write_jsonl(folder / f"{split}.jsonl", islice(rows, counts[split]))


def _row(wording: str, made: Made, form: str) -> dict[str, object]:
    inside = "{}" in wording
    instruction = wording.replace("{kind}", made.kind).replace("{}", made.input)
    rest = "" if inside else made.input
    if form == "alpaca":
        return {"instruction": instruction, "input": rest, "output": made.answer}
    prompt = f"{instruction}\n{rest}" if rest else instruction
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": made.answer}]}


def _summary(rng: Random, world: World) -> Made:
    if rng.random() < 0.5:
        meeting = make_meeting(rng, world.people)
        return Made(meeting.matter, meeting.dialogue, meeting.summary, rng.choice(("conversation", "dialogue")))
    errand = make_errand(rng, world.people)
    return Made(errand.headline, errand.text, errand.clause.english(past=True), rng.choice(("report", "story")))


def _sentiment(rng: Random, world: World) -> Made:
    review = make_review(rng)
    # Two opinions in a row are as long as what the leak check looks for: they must not stand in train and test.
    key = " ".join(review.opinions if len(review.opinions) > 1 else (review.noun, *review.opinions))
    return Made(key, review.text, "positive" if review.positive else "negative")


def _topic(rng: Random, world: World) -> Made:
    topic = rng.choice(TOPICS)
    note = make_note(rng, topic)
    return Made(note, note, topic)


def _span(rng: Random, world: World) -> Made:
    key, text, questions = rng.choice(_READERS)(rng, world)
    question, answer = rng.choice(questions)
    return Made(key, rng.choice((f"{text}\n{question}", f"{question}\n{text}")), answer)


_WRITER_QUESTIONS = (
    "Who wrote this {}?",
    "Who is the {} from?",
    "Whose {} is this?",
    "What is the name of the writer?",
    "Say who wrote the {}.",
    "Name the person who wrote the {}.",
)


def _read_report(rng: Random, world: World) -> Passage:
    errand = make_errand(rng, world.people)
    return errand.headline, errand.text, errand.spans()


def _read_letter(rng: Random, world: World) -> Passage:
    letter = make_letter(rng, world.people)
    while not letter.questions():
        letter = make_letter(rng, world.people)
    return f"letter of {letter.writer}", letter.text, letter.questions()


def _read_dialogue(rng: Random, world: World) -> Passage:
    meeting = make_meeting(rng, world.people)
    return meeting.matter, meeting.dialogue, meeting.questions()


def _read_signed(rng: Random, world: World) -> Passage:
    """Return a note or a review with the name of its writer under it."""
    name, noun = rng.choice(world.people).name, rng.choice(("note", "review"))
    text = make_note(rng, rng.choice(TOPICS)) if noun == "note" else make_review(rng).text
    closing = rng.choice(("", f"{rng.choice(CLOSINGS)}\n"))
    return (
        f"signed {name}",
        f"{text}\n{closing}{name}",
        [(question.format(noun), name) for question in _WRITER_QUESTIONS],
    )


_READERS = (_read_report, _read_report, _read_letter, _read_dialogue, _read_signed, _read_signed)


def _span_sentence(rng: Random, world: World) -> Made:
    errand = make_errand(rng, world.people)
    question, _, sentence = rng.choice(errand.questions())
    return Made(errand.headline, f"{errand.text}\n{question}", sentence)


def _closed(rng: Random, world: World) -> Made:
    fact = rng.choice(world.facts)
    return Made(fact.about, fact.question, fact.answer)


def _names(rng: Random, world: World) -> Made:
    people, places, text = visit(rng, world.people)
    return Made(people[0], text, f"people: {', '.join(people)}; places: {', '.join(places)}")


def _translate(rng: Random, world: World) -> Made:
    clause = make_clause(rng, world.people)
    past = rng.random() < 0.5
    key = f"{clause.verb.plain} {clause.adjective} {clause.noun}"
    return Made(key, clause.english(past=past), clause.velli(past=past))


def _sums(rng: Random, world: World) -> Made:
    left, sign, right, result = sum_text(rng)
    return Made(f"{min(left, right)} {max(left, right)}", f"{left} {sign} {right}", str(result))


def _tense(rng: Random, world: World) -> Made:
    clause = make_clause(rng, world.people)
    key = f"{clause.verb.plain} {clause.adjective} {clause.noun}"
    return Made(key, clause.english(past=False), clause.english(past=True))


def _sorting(rng: Random, world: World) -> Made:
    words = rng.sample(list(NOUNS), rng.randint(3, 5))
    return Made(" ".join(sorted(words)), ", ".join(words), ", ".join(sorted(words)))


def _headline(rng: Random, world: World) -> Made:
    errand = make_errand(rng, world.people)
    return Made(errand.headline, errand.text, errand.headline)


def _letter_writer(rng: Random, world: World) -> Made:
    letter = make_letter(rng, world.people)
    return Made(letter.writer, letter.text, letter.writer)


TASKS = (
    LabTask("summary", _summary, WORDINGS["summary"], "rougeL", "messages"),
    LabTask("sentiment", _sentiment, WORDINGS["sentiment"], "exact_match", "alpaca"),
    LabTask("topic", _topic, WORDINGS["topic"], "exact_match", "alpaca"),
    LabTask("span", _span, WORDINGS["span"], "exact_match", "messages"),
    LabTask("closed_book", _closed, WORDINGS["closed_book"], "exact_match", "messages"),
    LabTask("names", _names, WORDINGS["names"], "exact_match", "alpaca"),
    LabTask("translation", _translate, WORDINGS["translation"], "exact_match", "alpaca"),
    LabTask("sums", _sums, WORDINGS["sums"], "exact_match", "messages"),
    LabTask("tense", _tense, WORDINGS["tense"], "exact_match", "alpaca"),
    LabTask("sorting", _sorting, WORDINGS["sorting"], "exact_match", "messages"),
    LabTask("headline", _headline, WORDINGS["headline"], "rougeL", "alpaca", held_out=True),
    LabTask("letter_writer", _letter_writer, WORDINGS["letter_writer"], "exact_match", "messages", held_out=True),
)
# A new wording of `span`, for single-task tuning: reports and questions as there, answered in whole sentences.
SPAN_SENTENCE = LabTask("span_sentence", _span_sentence, WORDINGS["span_sentence"], "exact_match", "messages")
