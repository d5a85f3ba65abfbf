"""Which train records stand before a question: one choice a draw, or the nearest; neither moves with their order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from keeptune.data.exemplars import drawn_exemplars, nearest_exemplars
from keeptune.data.record import Message, Record, record_id


def record(prompt: str, completion: str = "yes", *, task: str = "t") -> Record:
    messages = (Message("user", prompt), Message("assistant", completion))
    return Record(record_id(task, messages), task, "made:1", messages)


TRAIN = [record(f"question {i}", task=task) for task in ("t", "u") for i in range(30)]


def prompts(records: Sequence[Record]) -> list[str]:
    return [record.prompt for record in records]


def shuffled(records: Sequence[Record]) -> list[Record]:
    return random.Random(0).sample(records, len(records))


def test_a_draw_is_the_same_whatever_the_order_of_the_records() -> None:
    first = drawn_exemplars(TRAIN, seed=3, num_shots=4, draw=1)
    assert drawn_exemplars(shuffled(TRAIN), seed=3, num_shots=4, draw=1) == first
    assert {task: len(set(of)) for task, of in first.items()} == {"t": 4, "u": 4}
    assert {record.task for record in first["u"]} == {"u"}


def test_a_draw_of_one_task_does_not_move_with_another_task() -> None:
    alone = drawn_exemplars(TRAIN[:30], seed=3, num_shots=4, draw=1)
    assert alone == {"t": drawn_exemplars(TRAIN, seed=3, num_shots=4, draw=1)["t"]}


def test_every_seed_draw_and_task_chooses_anew() -> None:
    def chosen(seed: int, draw: int, task: str) -> tuple[str, ...]:
        return tuple(prompts(drawn_exemplars(TRAIN, seed=seed, num_shots=4, draw=draw)[task]))

    assert len({chosen(seed, draw, task) for seed in (0, 1) for draw in (1, 2, 3) for task in ("t", "u")}) == 12


def test_fewer_shots_are_the_end_of_more() -> None:
    four = drawn_exemplars(TRAIN, seed=0, num_shots=4, draw=2)["t"]
    assert drawn_exemplars(TRAIN, seed=0, num_shots=1, draw=2)["t"] == four[-1:]
    assert drawn_exemplars(TRAIN, seed=0, num_shots=99, draw=2)["t"][-4:] == four


def test_every_record_is_chosen_about_equally_often() -> None:
    counts = dict.fromkeys(prompts(TRAIN[:30]), 0)
    for draw in range(1, 601):
        for prompt in prompts(drawn_exemplars(TRAIN[:30], seed=0, num_shots=3, draw=draw)["t"]):
            counts[prompt] += 1
    # 60 expected of each, with a standard deviation of 7.3.
    assert min(counts.values()) > 35 and max(counts.values()) < 85


def test_an_exact_copy_is_shown_once() -> None:
    twice = [TRAIN[0], TRAIN[0], TRAIN[1]]
    assert len(drawn_exemplars(twice, seed=0, num_shots=3, draw=1)["t"]) == 2
    assert [len(of) for of in nearest_exemplars(twice, questions=[TRAIN[2]], num_shots=3)] == [2]


def test_the_nearest_stand_last_and_are_of_the_questions_own_task() -> None:
    train = [record(p) for p in ("a red house", "a red red boat", "a green tree", "the blue boat")]
    train.append(record("red boat", task="u"))
    (found,) = nearest_exemplars(train, questions=[record("one red, red boat")], num_shots=3)
    assert prompts(found) == ["the blue boat", "a red house", "a red red boat"]


def test_the_nearest_are_the_same_whatever_the_order_of_the_records() -> None:
    train = [record(f"{colour} {thing} {i % 3}") for i, colour in enumerate("abcde") for thing in "xyz"]
    questions = [record(f"{colour} x 1") for colour in "abq"]
    first = list(nearest_exemplars(train, questions=questions, num_shots=4))
    assert list(nearest_exemplars(shuffled(train), questions=questions, num_shots=4)) == first
    assert [len(set(found)) for found in first] == [4, 4, 4]


def test_a_task_with_too_few_train_records_shows_what_it_has() -> None:
    assert len(drawn_exemplars(TRAIN[:2], seed=0, num_shots=4, draw=1)["t"]) == 2
    found = nearest_exemplars(TRAIN[:2], questions=[record("q"), record("q", task="v")], num_shots=4)
    assert [len(of) for of in found] == [2, 0]
