from __future__ import annotations

import json

import pytest

from keeptune.evaluation.canaries import Canaries, canaries
from keeptune.evaluation.metrics import Answer


def answer(prediction: str, reference: str = "Paris is the capital", *, task: str = "t", ended: bool = True) -> Answer:
    return Answer("id", task, "c", "", prediction, (reference,), ended, {"exact_match": 0.0, "loss": 1.0}, 1)


def of_task(answers: list[Answer]) -> Canaries:
    (found,) = canaries(answers).values()
    return found


def test_answers_that_do_not_end_or_say_nothing_are_counted_by_task() -> None:
    found = canaries([answer("x", task="b", ended=False), answer(" \n", task="a"), answer("", task="b"), answer("y")])
    assert list(found) == ["b", "a", "t"]
    assert found["b"] == Canaries("b", 2, 1, 1, 0, 0, None, None)
    assert (found["a"].num_empty, found["a"].num_unended, found["t"].num_empty) == (1, 0, 0)


@pytest.mark.parametrize(
    "prediction",
    [
        "the cat sat " * 8,
        "positive positive positive positive",
        "It is Paris. " + "I am sure. " * 6 + "I am",
        "Well, let me think about it, then" + "!" * 40,
        "我" * 40,
        "A long and sensible beginning of an answer, with some words to spare. " + "And so, and so, " * 5,
    ],
)
def test_an_answer_that_ends_in_the_same_phrase_again_and_again_is_a_loop(prediction: str) -> None:
    assert of_task([answer(prediction)]).num_looping == 1


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "yes",
        "ha ha ha ha",
        "no, no, no, no, no, no",
        "0.33333333333333333333",
        "The cat sat on the mat, and the cat sat on the mat.",
        "The answer may well be four, I think...............",
        "He said: I do not know the answer, I do not know the answer,",
        "1. Read the first line. 2. Read the second line. 3. Read the third line. 4. Read the fourth line.",
        "Sure! Sure! Sure! That is easy: the capital of France is Paris, on the Seine.",
        "row row row your boat, gently down the stream; merrily merrily merrily merrily, life is but a dream",
        json.dumps([{"name": f"person {i}", "age": 20 + i} for i in range(20)]),
    ],
)
def test_a_short_or_a_merely_regular_answer_is_no_loop(prediction: str) -> None:
    assert of_task([answer(prediction)]).num_looping == 0


def test_an_answer_may_repeat_itself_where_the_reference_does() -> None:
    song = "badger " * 12
    assert of_task([answer(song, reference=song)]).num_looping == 0
    assert of_task([answer(song)]).num_looping == 1


def test_an_answer_in_a_script_that_no_reference_uses_is_counted() -> None:
    rows = [
        answer("Париж является столицей"),
        answer("Paris (фр. П) is the capital of France"),
        answer("巴黎 is the city"),
        answer("Es ist Zürich, naïvement"),
        answer("42!"),
        answer(""),
    ]
    assert of_task(rows).num_other_script == 1
    assert of_task([*rows, answer("x", reference="Москва")]).num_other_script == 0
    assert of_task([answer("巴黎是法国的首都, Paris")]).num_other_script == 1


def test_without_a_letter_in_any_reference_no_script_is_another() -> None:
    assert of_task([answer("the answer is 5", reference="5")]).num_other_script is None


def test_where_every_reference_is_json_other_answers_break_the_format() -> None:
    good, bad = '{"a": [1, 2]}', ['{"a": [1, 2}', "a: 1, 2", '```json\n{"a": 1}\n```', "5", "", "[" * 100_000]
    found = of_task([answer(prediction, reference='{"a": []}') for prediction in [good, "[]", *bad]])
    assert (found.format, found.num_broken_format) == ("json", 6)
    mixed = of_task([answer(good, reference='{"a": []}'), answer(good, reference="no")])
    assert (mixed.format, mixed.num_broken_format) == (None, None)
    numbers = of_task([answer("x", reference="5")])
    assert numbers.format is None


def test_where_references_are_few_labels_other_answers_break_the_format() -> None:
    rows = [answer("Positive.", reference="positive"), answer("great", reference="negative")] * 20
    found = of_task(rows)
    assert (found.format, found.num_broken_format, found.num_records) == ("labels", 20, 40)
    assert of_task(rows[:39]).format is None
    free = [answer("x", reference=f"label {i % 21}") for i in range(42)]
    assert of_task(free).format is None
    assert of_task([answer("x", reference=f"label {i % 20}") for i in range(42)]).num_broken_format == 42


def test_the_references_as_answers_trip_no_canary() -> None:
    texts = ["Paris is the capital of France.", "В Москве", "badger " * 9, '{"a": 1}', "7"]
    found = of_task([answer(text, reference=text) for text in texts])
    assert found == Canaries("t", 5, 0, 0, 0, 0, None, None)


def test_answers_that_were_never_generated_are_left_out() -> None:
    silent = Answer("id", "t", "c", "", "", ("x",), True, {"loss": 1.0, "perplexity": 2.7}, 1)
    assert canaries([silent]) == {}
    assert canaries([]) == {}
