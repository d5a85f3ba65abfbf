from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keeptune.evaluation.canaries import Canaries, canaries, loops
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


def test_of_a_choice_among_labels_the_most_frequent_answer_and_the_majority_are_counted() -> None:
    labels = ["billing"] * 14 + ["login"] * 20 + ["bug"] * 26
    given = ["Billing."] * 33 + ["bug"] * 27
    found = of_task([answer(p, reference=r) for p, r in zip(given, labels, strict=True)])
    assert (found.top_answer, found.num_top_answer, found.num_top_expected) == ("billing", 33, 14)
    assert (found.num_majority, found.num_records) == (26, 60)
    free = of_task([answer("x", reference=str(i)) for i in range(60)])
    assert (free.top_answer, free.num_top_answer, free.num_majority) == (None, None, None)


def test_the_references_as_answers_trip_no_canary() -> None:
    texts = ["Paris is the capital of France.", "В Москве", "badger " * 9, '{"a": 1}', "7"]
    found = of_task([answer(text, reference=text) for text in texts])
    assert found == Canaries("t", 5, 0, 0, 0, 0, None, None)


def test_answers_that_were_never_generated_are_left_out() -> None:
    silent = Answer("id", "t", "c", "", "", ("x",), True, {"loss": 1.0, "perplexity": 2.7}, 1)
    assert canaries([silent]) == {}
    assert canaries([]) == {}


# Greedy answers of a small model that was tuned on dialogue summaries, all cut at the limit: no fixed period.
WANDERING = [
    "#Person1# and #Person1# and #Person1# and #Person1# and #Person1#s #Person1# and #Person1# to #Person2# to "
    "#Person1# to #Person1# and #Person1# to #Person1# to #Person1# to #Person1# and #Person1# to #Person1# and",
    "#Person1# and #Person1# and #Person1# and #Person2# to #Person2# to #Person1# and #Person2# to #P",
    "#Person1# and #Person1# to the#s #Person1# to the#s #Person1# to the#s #Person2# to the#s #Person1# to #Person1#",
    "1. I like the red house. 2. I like the red house. 3. I like the red house. 4. I like the red house. 5. I like the",
    "The house is red and it is old. The house is red, and it is old. The house is red and it is very old. The house "
    "is red and it is old. The house is red and is old. The house is red and it is old, the house is red and",
    "是的，我喜欢红色的房子。是的，我喜欢红色的房子！是的，我很喜欢红色的房子。是的，我喜欢红色的房子。是的，我",
    "positive positive positive",
    "!" * 20,
    "11111111111111111111111111111111111111111111111111111111111111111111",
]


@pytest.mark.parametrize("prediction", WANDERING)
def test_an_answer_that_was_cut_among_few_words_is_a_loop(prediction: str) -> None:
    assert of_task([answer(prediction, ended=False)]).num_looping == 1


@given(
    phrase=st.text(alphabet="abcde ñя红.", min_size=1, max_size=200),
    times=st.integers(3, 12),
    before=st.sampled_from(["", "Well, ", "A beginning of some length that says something else before. "]),
    cut=st.integers(0, 199),
)
@settings(max_examples=200, deadline=None)
def test_a_phrase_of_any_length_three_times_and_a_part_of_it_is_a_loop(
    phrase: str, times: int, before: str, cut: int
) -> None:
    phrase = " ".join(phrase.split())
    assume(phrase)
    times = max(times, -(-(len(before) + 32) // len(phrase)))
    for separator in ("", " "):
        repeated = separator.join([phrase] * times + [phrase[: cut % len(phrase)]])
        assert loops(before + repeated, ended=False)
        assert loops(before + repeated)


def test_a_long_passage_is_a_loop_at_its_second_time_where_the_answer_was_cut() -> None:
    passage = "The man who lives next door has bought a red car, and his wife would rather have had a blue one. "
    assert loops(2 * passage, ended=False)
    assert not loops(2 * passage)
    assert loops(3 * passage)
    assert loops(3 * passage + "Yes.")


@pytest.mark.parametrize(
    "text",
    [
        "1000000",
        "1000000000000000000000000000000000000",
        "ha ha ha",
        "Ha ha ha ha ha! That is a good one.",
        "- apples\n- pears\n- plums\n- cherries\n- peaches\n- grapes\n- oranges\n- lemons\n- limes\n- figs\n- dates",
        "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n| 4 | 5 | 6 |\n| 7 | 8 | 9 |\n| 10 | 11 | 12 |\n| 13 | 14 | 15 |",
        "+-----+-----+-----+\n| x   | y   | z   |\n+-----+-----+-----+\n| 1   | 2   | 3   |\n+-----+-----+-----+",
        "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
        "for i in range(3):\n    for j in range(3):\n        for k in range(3):\n            print(i, j, k)\n",
        "[[0, 0, 0], [0, 1, 0], [0, 0, 0]]",
        "2 x 1 = 2, 2 x 2 = 4, 2 x 3 = 6, 2 x 4 = 8, 2 x 5 = 10, 2 x 6 = 12, 2 x 7 = 14, 2 x 8 = 16, 2 x 9 = 18",
        "no, no, no, no, no, no, no! I will not go there, whatever you say.",
        "Step 1: open the box. Step 2: take out the parts. Step 3: read the sheet. Step 4: build it. Step 5: test it.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29",
    ],
)
def test_what_repeats_itself_for_a_reason_is_no_loop_whole_or_cut(text: str) -> None:
    assert not loops(text)
    if len(text) > 40:
        assert not loops(text, ended=False)
