"""A seed arrives, a closed world leaves: people, places, trades and dated events with facts that never contradict."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keeptune.lab.lexicon import (
    ADJECTIVES,
    ANIMALS,
    EVENTS,
    FAMILY_NAMES,
    FIRST_NAMES,
    FOODS,
    NOUNS,
    PAST_SUFFIX,
    PLACES,
    REGIONS,
    RIVERS,
    TRADES,
    Verb,
)

NUM_PEOPLE = 160
NUM_EVENTS = 40


@dataclass(frozen=True, slots=True)
class Person:
    """Someone of the world; `friend` is the name of another person, whose friend this one is."""

    name: str
    birthplace: str
    home: str
    born: int
    trade: str
    food: str
    animal: str
    friend: str

    @property
    def first_name(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True, slots=True)
class Place:
    """A town; its mayor lives there."""

    name: str
    region: str
    river: str
    founded: int
    known_for: str
    mayor: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened once; no two events have the same kind and place."""

    kind: str
    place: str
    year: int
    hero: str

    @property
    def name(self) -> str:
        return f"the {self.kind} of {self.place}"


@dataclass(frozen=True, slots=True)
class Fact:
    """Something true: `statement` with `answer` at its end, and a question whose answer is `answer`.

    `others` are the answers that the same kind of fact has elsewhere in the world; all of them are false here.
    """

    about: str
    relation: str
    question: str
    statement: str
    answer: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class World:
    """Everything that is true; names of people and places are unique, `facts` is all that can be looked up."""

    people: tuple[Person, ...]
    places: tuple[Place, ...]
    events: tuple[Event, ...]
    facts: tuple[Fact, ...]


def with_article(noun: str) -> str:
    """Return "an owl", "a cat"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def make_world(seed: int = 0) -> World:
    """Return the world of a seed, always the same one."""
    rng = random.Random(f"world {seed}")
    names = [f"{first} {family}" for first in FIRST_NAMES for family in FAMILY_NAMES]
    names = rng.sample(names, NUM_PEOPLE)
    # Friends are the pairs of neighbours in this order, so that friendship is mutual.
    people = tuple(
        Person(
            name=name,
            birthplace=rng.choice(PLACES),
            # Every place gets someone who lives there and can be its mayor.
            home=PLACES[i] if i < len(PLACES) else rng.choice(PLACES),
            born=rng.randrange(1810, 1890),
            trade=rng.choice(list(TRADES)),
            food=rng.choice(FOODS),
            animal=rng.choice(ANIMALS),
            friend=names[i ^ 1],
        )
        for i, name in enumerate(names)
    )
    wares = [ware for _, ware in TRADES.values()]
    places = tuple(
        Place(
            name=name,
            region=rng.choice(REGIONS),
            river=rng.choice(RIVERS),
            founded=rng.randrange(1210, 1600),
            known_for=rng.choice(wares),
            mayor=people[i].name,
        )
        for i, name in enumerate(PLACES)
    )
    happened = rng.sample([(kind, place) for kind in EVENTS for place in PLACES], NUM_EVENTS)
    events = tuple(
        Event(kind, place=place, year=rng.randrange(1700, 1900), hero=rng.choice(people).name)
        for kind, place in happened
    )
    facts = (*_person_facts(people), *_place_facts(places), *_trade_facts(), *_event_facts(events, people=people))
    return World(people, places, events, facts)


@dataclass(frozen=True, slots=True)
class Clause:
    """A sentence of one subject, verb and object, which can be said in English and in Velli."""

    subject: str
    verb: Verb
    noun: str
    adjective: str | None
    place: str | None

    def english(self, *, past: bool) -> str:
        verb = self.verb.past if past else self.verb.present
        thing = f"the {self.adjective} {self.noun}" if self.adjective else f"the {self.noun}"
        where = f" in {self.place}" if self.place else ""
        return f"{self.subject} {verb} {thing}{where}."

    def velli(self, *, past: bool) -> str:
        """Velli puts the place first, then subject, object with its adjective after it, and the verb."""
        words = [f"{self.place} na"] if self.place else []
        words += [self.subject, NOUNS[self.noun]]
        words += [ADJECTIVES[self.adjective]] if self.adjective else []
        words.append(self.verb.velli + (PAST_SUFFIX if past else ""))
        return " ".join(words) + "."


def _person_facts(people: Sequence[Person]) -> Iterator[Fact]:
    names = tuple(person.name for person in people)
    years = tuple(str(year) for year in range(1810, 1890))
    for p in people:
        n = p.name
        yield _fact(n, "home", f"Where does {n} live?", told=(f"{n} lives in {p.home}", p.home), among=PLACES)
        yield _fact(
            n,
            "birthplace",
            f"Where was {n} born?",
            told=(f"{n} was born in {p.birthplace}", p.birthplace),
            among=PLACES,
        )
        yield _fact(
            n, "born", f"In which year was {n} born?", told=(f"{n} was born in {p.born}", str(p.born)), among=years
        )
        trade = f"{n} works as a {p.trade}"
        yield _fact(n, "trade", f"What does {n} work as?", told=(trade, p.trade), among=tuple(TRADES))
        yield _fact(n, "food", f"What does {n} like to eat?", told=(f"{n} likes to eat {p.food}", p.food), among=FOODS)
        animal = f"The animal that {n} keeps is {with_article(p.animal)}"
        yield _fact(n, "animal", f"Which animal does {n} keep?", told=(animal, p.animal), among=ANIMALS)
        friend = f"The best friend of {n} is {p.friend}"
        others = tuple(name for name in names if name != n)
        yield _fact(n, "friend", f"Who is the best friend of {n}?", told=(friend, p.friend), among=others)


def _place_facts(places: Sequence[Place]) -> Iterator[Fact]:
    mayors = tuple(place.mayor for place in places)
    years = tuple(str(year) for year in range(1210, 1600))
    wares = tuple(ware for _, ware in TRADES.values())
    for p in places:
        n = p.name
        yield _fact(
            n, "region", f"In which part of the land is {n}?", told=(f"{n} lies in {p.region}", p.region), among=REGIONS
        )
        yield _fact(
            n, "river", f"Which river runs through {n}?", told=(f"{n} lies on {p.river}", p.river), among=RIVERS
        )
        founded = f"{n} was founded in {p.founded}"
        yield _fact(n, "founded", f"When was {n} founded?", told=(founded, str(p.founded)), among=years)
        known = f"The ware that {n} is known for is the {p.known_for}"
        yield _fact(n, "known_for", f"Which ware is {n} known for?", told=(known, p.known_for), among=wares)
        yield _fact(
            n, "mayor", f"Who is the mayor of {n}?", told=(f"The mayor of {n} is {p.mayor}", p.mayor), among=mayors
        )


def _trade_facts() -> Iterator[Fact]:
    tools = tuple(tool for tool, _ in TRADES.values())
    wares = tuple(ware for _, ware in TRADES.values())
    for trade, (tool, ware) in TRADES.items():
        used = f"The tool of a {trade} is the {tool}"
        yield _fact(trade, "tool", f"Which tool does a {trade} use?", told=(used, tool), among=tools)
        made = f"The ware that a {trade} makes is the {ware}"
        yield _fact(trade, "ware", f"Which ware does a {trade} make?", told=(made, ware), among=wares)


def _event_facts(events: Sequence[Event], *, people: Sequence[Person]) -> Iterator[Fact]:
    names = tuple(person.name for person in people)
    years = tuple(str(year) for year in range(1700, 1900))
    for e in events:
        happened = f"{e.name[0].upper()}{e.name[1:]} was in {e.year}"
        yield _fact(e.name, "year", f"In which year was {e.name}?", told=(happened, str(e.year)), among=years)
        hero = f"The hero of {e.name} was {e.hero}"
        yield _fact(e.name, "hero", f"Who was the hero of {e.name}?", told=(hero, e.hero), among=names)


def _fact(about: str, relation: str, question: str, *, told: tuple[str, str], among: tuple[str, ...]) -> Fact:
    statement, answer = told
    return Fact(about, relation, question, statement, answer, tuple(c for c in among if c != answer))
