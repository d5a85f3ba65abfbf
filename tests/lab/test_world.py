"""The world is closed and consistent: every fact can be looked up, and nothing that is said contradicts one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from itertools import islice

import pytest

from keeptune.lab.lexicon import ADJECTIVES, NOUNS, VERBS
from keeptune.lab.text import running_text
from keeptune.lab.world import Clause, Person, make_world

WORLD = make_world()
PEOPLE = {person.name: person for person in WORLD.people}
PLACES = {place.name: place for place in WORLD.places}
DOCUMENTS = list(islice(running_text(WORLD, seed=0), 4_000))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_the_world_is_always_the_same() -> None:
    assert make_world() == WORLD
    assert make_world(1) != WORLD
    assert sha(repr(WORLD)) == "b64aef5169ca"


def test_names_are_unique_and_friendship_is_mutual() -> None:
    assert len(PEOPLE) == len(WORLD.people) == 160
    assert len(PLACES) == len(WORLD.places) == 30
    assert len({event.name for event in WORLD.events}) == len(WORLD.events) == 40
    assert all(PEOPLE[person.friend].friend == person.name != person.friend for person in WORLD.people)


def test_a_mayor_lives_in_the_own_town() -> None:
    assert all(PEOPLE[place.mayor].home == place.name for place in WORLD.places)


def test_a_question_has_one_answer_and_the_false_ones_are_false() -> None:
    questions = [fact.question for fact in WORLD.facts]
    assert len(set(questions)) == len(questions) == 1_398
    for fact in WORLD.facts:
        assert fact.statement.endswith(f" {fact.answer}")
        assert fact.answer not in fact.others and len(fact.others) >= 5


@pytest.mark.parametrize(
    ("relation", "truth"),
    [
        ("home", lambda p: p.home),
        ("birthplace", lambda p: p.birthplace),
        ("born", lambda p: str(p.born)),
        ("trade", lambda p: p.trade),
        ("food", lambda p: p.food),
        ("animal", lambda p: p.animal),
        ("friend", lambda p: p.friend),
    ],
)
def test_facts_say_what_the_world_is(relation: str, truth: Callable[[Person], str]) -> None:
    found = {fact.about: fact.answer for fact in WORLD.facts if fact.relation == relation}
    assert found == {name: truth(person) for name, person in PEOPLE.items()}


@pytest.mark.parametrize(
    ("pattern", "truth"),
    [
        (r"([A-Z]\w+ [A-Z]\w+) lives in (\w+)", lambda name: PEOPLE[name].home),
        (r"The home of ([A-Z]\w+ [A-Z]\w+) is (\w+)", lambda name: PEOPLE[name].home),
        (r"([A-Z]\w+ [A-Z]\w+) was born in ([A-Z]\w+)", lambda name: PEOPLE[name].birthplace),
        (r"([A-Z]\w+ [A-Z]\w+) was born in (\d+)", lambda name: str(PEOPLE[name].born)),
        (r"([A-Z]\w+ [A-Z]\w+) works as an? ([a-z ]+)", lambda name: PEOPLE[name].trade),
        (r"([A-Z]\w+ [A-Z]\w+) likes to eat (\w+)", lambda name: PEOPLE[name].food),
        (r"([A-Z]\w+ [A-Z]\w+) keeps an? (\w+)", lambda name: PEOPLE[name].animal),
        (r"[Tt]he best friend of ([A-Z]\w+ [A-Z]\w+) is (\w+ \w+)", lambda name: PEOPLE[name].friend),
        (r"The mayor of ([A-Z]\w+) is (\w+ \w+)", lambda name: PLACES[name].mayor),
        (r"([A-Z]\w+) was founded in (\d+)", lambda name: str(PLACES[name].founded)),
        (r"([A-Z]\w+) lies in (the \w+)", lambda name: PLACES[name].region),
    ],
)
def test_running_text_never_contradicts_the_world(pattern: str, truth: Callable[[str], str]) -> None:
    found = [match for document in DOCUMENTS for match in re.findall(pattern, document)]
    assert len(found) > 50
    assert {(name, said) for name, said in found} == {(name, truth(name)) for name, _ in found}


def test_sums_in_running_text_are_right() -> None:
    found = [match for document in DOCUMENTS for match in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", document)]
    assert len(found) > 500
    assert all((int(a) + int(b) if sign == "+" else int(a) - int(b)) == int(c) for a, sign, b, c in found)


def test_running_text_is_always_the_same_and_holds_no_instruction_format() -> None:
    assert list(islice(running_text(WORLD, seed=0), 50)) == DOCUMENTS[:50]
    assert list(islice(running_text(WORLD, seed=1), 50)) != DOCUMENTS[:50]
    assert sha("\n\n".join(DOCUMENTS)) == "fcb8a122aff5"
    assert not re.search(r"###|<\||Instruction|Response:|Input:|Output:", "\n".join(DOCUMENTS))


def test_running_text_rarely_repeats_a_document() -> None:
    assert len(set(DOCUMENTS)) > 0.99 * len(DOCUMENTS)


def test_every_fact_is_stated_in_running_text() -> None:
    text = "\n".join(islice(running_text(WORLD, seed=0), 20_000))
    assert not [fact.statement for fact in WORLD.facts if fact.statement not in text]


def test_an_answer_to_a_question_in_running_text_is_true() -> None:
    truth = {fact.question: fact.answer for fact in WORLD.facts}
    asked = [
        (question, document[start : start + 120])
        for document in DOCUMENTS
        for question in re.findall(r"(?:In|Wh)[^.?\n]+\?", document)
        if question in truth
        for start in [document.index(question) + len(question)]
    ]
    assert len(asked) > 800
    assert all(truth[question].lower() in after.lower() for question, after in asked)


def test_nobody_is_said_to_be_of_another_town() -> None:
    found = [
        match
        for document in DOCUMENTS
        for match in re.findall(r"([A-Z]\w+ [A-Z]\w+)(?:, who lives in| of) (\w+)", document)
    ]
    found = [(name, place) for name, place in found if name in PEOPLE and place in PLACES]
    assert len(found) > 20
    assert all(PEOPLE[name].home == place for name, place in found)


def test_velli_has_its_own_words_and_word_order() -> None:
    words = [*NOUNS.values(), *ADJECTIVES.values(), *(verb.velli for verb in VERBS)]
    assert len(set(words)) == len(words)
    # "malo" is a hammer in Velli and a name as "Malo".
    assert not {word for word in words if word in NOUNS or word in ADJECTIVES}
    verb = next(verb for verb in VERBS if verb.plain == "mend")
    clause = Clause("Vera", verb=verb, noun="cap", adjective="old", place="Nessa")
    assert clause.english(past=False) == "Vera mends the old cap in Nessa."
    assert clause.english(past=True) == "Vera mended the old cap in Nessa."
    assert clause.velli(past=False) == "Nessa na Vera hetta vetu jeva."
    assert clause.velli(past=True) == "Nessa na Vera hetta vetu jevata."
