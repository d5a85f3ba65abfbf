"""A world and a seed arrive, instruction rows with known answers leave, in the ordinary formats.

What a task holds back from train: each of its examples has a key (a fact's subject, a pair of numbers, a set of words
…), and the hash of that key alone says in which split every example with that key is. Two of each task's wordings are
for validation and test alone, and used there in half of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from keeptune.data.record import SPLIT_NAMES, SplitName
from keeptune.lab.lexicon import NOUNS, TOPICS
from keeptune.lab.scenes import (
    make_clause,
    make_errand,
    make_letter,
    make_meeting,
    make_note,
    make_review,
    sum_text,
    visit,
)
from keeptune.lab.world import World

# Of 100 keys: those below the first bound are test, those below the second validation.
_TEST_BELOW, _VALIDATION_BELOW = 15, 30
_NUM_HELD_OUT_WORDINGS = 2


@dataclass(frozen=True, slots=True)
class Made:
    """One example before it is worded: `key` decides its split; `input` may be empty where the question says all."""

    key: str
    input: str
    answer: str


@dataclass(frozen=True, slots=True)
class LabTask:
    """A task of the lab. `wordings` hold `{}` where the input stands inside the instruction, else it follows it."""

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
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row, _ in zip(rows, range(counts[split]), strict=False):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _row(wording: str, made: Made, form: str) -> dict[str, object]:
    inside = "{}" in wording
    instruction = wording.replace("{}", made.input) if inside else wording
    rest = "" if inside else made.input
    if form == "alpaca":
        return {"instruction": instruction, "input": rest, "output": made.answer}
    prompt = f"{instruction}\n{rest}" if rest else instruction
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": made.answer}]}


def _summary(rng: Random, world: World) -> Made:
    meeting = make_meeting(rng, world.people)
    return Made(f"{meeting.activity} {meeting.place} {meeting.spot}", meeting.dialogue, meeting.summary)


def _sentiment(rng: Random, world: World) -> Made:
    review = make_review(rng)
    return Made(review.text, review.text, "positive" if review.positive else "negative")


def _topic(rng: Random, world: World) -> Made:
    topic = rng.choice(TOPICS)
    note = make_note(rng, topic)
    return Made(note, note, topic)


def _span(rng: Random, world: World) -> Made:
    errand = make_errand(rng, world.people)
    question, answer, _ = rng.choice(errand.questions())
    return Made(errand.headline, f"{errand.text}\n{question}", answer)


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
    return Made(f"{left} {sign} {right}", f"{left} {sign} {right}", str(result))


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


_SPAN_WORDINGS = (
    "Read the text and answer the question in a few words.",
    "Answer the question with words from the text.",
    "What does the text say? Answer briefly.",
    "Find the answer to the question in the text.",
    "Here is a report and a question about it. Answer the question.",
    "Use the text to answer.",
    "Answer the question that follows the text.",
    "Read the report, then answer briefly.",
)
TASKS = (
    LabTask(
        "summary",
        _summary,
        (
            "Summarize the dialogue in one sentence.",
            "What do the two agree on? Write one sentence.",
            "Write a one-sentence summary of this conversation.",
            "Sum up the following dialogue.",
            "Read the conversation and say in one sentence what will happen.",
            "Give a short summary of the dialogue.",
            "Summarize this conversation.",
            "Sum up in one sentence what the two will do.",
        ),
        "rougeL",
        "messages",
    ),
    LabTask(
        "sentiment",
        _sentiment,
        (
            "Is this review positive or negative?",
            "Does the buyer like the thing? Answer positive or negative.",
            "Decide whether the review is positive or negative.",
            "Classify the review as positive or negative.",
            "What is the sentiment of this review, positive or negative?",
            "Read the review and answer with positive or negative.",
            "Say whether this review is positive or negative.",
            "Positive or negative? Judge the review.",
        ),
        "exact_match",
        "alpaca",
    ),
    LabTask(
        "topic",
        _topic,
        (
            "Choose the topic of the note: building, harvest, market, music, school or weather.",
            "What is the note about: building, harvest, market, music, school or weather?",
            "Which topic does the note belong to: building, harvest, market, music, school or weather?",
            "Classify the note as building, harvest, market, music, school or weather.",
            "Name the topic of this note: building, harvest, market, music, school or weather.",
            "Is the note about building, harvest, market, music, school or weather?",
            "Name the topic: building, harvest, market, music, school or weather.",
            "Sort the note under building, harvest, market, music, school or weather.",
        ),
        "exact_match",
        "alpaca",
    ),
    LabTask("span", _span, _SPAN_WORDINGS, "exact_match", "messages"),
    LabTask(
        "closed_book",
        _closed,
        (
            "Answer the question from what you know.",
            "Answer briefly.",
            "Question: {}",
            "{} Answer in a few words.",
            "Do you know this? {}",
            "Give a short answer: {}",
            "{}",
            "Answer the question: {}",
        ),
        "exact_match",
        "messages",
    ),
    LabTask(
        "names",
        _names,
        (
            "List the people and the places in the sentence.",
            "Which people and places are named here?",
            "Find all names of people and places.",
            "Write down the people and the places of this sentence.",
            "Extract the people and the places.",
            "Name the people and the places that the sentence mentions.",
            "List all people and places that are named in the sentence.",
            "Find the people and the places in this sentence.",
        ),
        "exact_match",
        "alpaca",
    ),
    LabTask(
        "translation",
        _translate,
        (
            "Translate the sentence into Velli.",
            "Say it in Velli.",
            "How do you say this in Velli?",
            "Write the sentence in Velli.",
            "Give the Velli translation.",
            "Put this into Velli: {}",
            "Translate into Velli: {}",
            "What is this sentence in Velli?",
        ),
        "exact_match",
        "alpaca",
    ),
    LabTask(
        "sums",
        _sums,
        (
            "How much is {}?",
            "Work out {}.",
            "Calculate {}.",
            "What is the result of {}?",
            "Solve this sum: {}",
            "{} = ?",
            "Work out the sum.",
            "Calculate the result of {}.",
        ),
        "exact_match",
        "messages",
    ),
    LabTask(
        "tense",
        _tense,
        (
            "Rewrite the sentence in the past tense.",
            "Put the sentence into the past tense.",
            "Change the tense from present to past.",
            "Say that it happened yesterday.",
            "Write this in the past tense.",
            "Turn the present tense into the past tense.",
            "Rewrite this in the past.",
            "Change the sentence to the past tense.",
        ),
        "exact_match",
        "alpaca",
    ),
    LabTask(
        "sorting",
        _sorting,
        (
            "Sort the words by the alphabet.",
            "Put the words in alphabetical order.",
            "Write these words in the order of the alphabet.",
            "Order the words from A to Z.",
            "Sort from A to Z: {}",
            "Arrange the words alphabetically.",
            "Sort these words alphabetically.",
            "Put these words in the order of the alphabet.",
        ),
        "exact_match",
        "messages",
    ),
    LabTask(
        "headline",
        _headline,
        (
            "Write a headline for this report.",
            "What would be the headline?",
            "Give the report a headline.",
            "Find a headline.",
            "Put a headline over the report.",
            "Which headline fits this report?",
            "Write the headline.",
            "Give a headline for the text.",
        ),
        "rougeL",
        "alpaca",
        held_out=True,
    ),
    LabTask(
        "letter_writer",
        _letter_writer,
        (
            "Who wrote this letter?",
            "Name the writer of the letter.",
            "Who is the letter from?",
            "Say who wrote the letter.",
            "Whose letter is this?",
            "Give the name of the writer.",
            "Who sent this letter?",
            "Find the name of the person who wrote the letter.",
        ),
        "exact_match",
        "messages",
        held_out=True,
    ),
)
# A new wording of `span`, for single-task tuning: the same passages and questions, answered in whole sentences.
SPAN_SENTENCE = LabTask(
    "span_sentence",
    _span_sentence,
    (
        "Read the text and answer the question in a full sentence.",
        "Answer the question with a whole sentence.",
        "What does the text say? Answer in a sentence.",
        "Use the text to answer in a full sentence.",
        "Here is a report and a question about it. Answer in one sentence.",
        "Write the answer to the question as a sentence.",
        "Answer in a full sentence.",
        "Read the report, then answer with a sentence.",
    ),
    "exact_match",
    "messages",
)
