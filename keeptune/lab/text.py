"""A world and a seed arrive, running text for pre-training leaves, one document at a time; no instructions in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from keeptune.lab.lexicon import (
    ADJECTIVES,
    ANIMALS,
    DAYS,
    EVENTS,
    FOODS,
    NOUNS,
    PLACES,
    TOPICS,
    TRADES,
)
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
from keeptune.lab.world import Event, Fact, Person, Place, World, with_article

_Writer = Callable[[Random, World], str]


def running_text(world: World, *, seed: int) -> Iterator[str]:
    """Yield documents of up to 200 words without end, the same ones for the same world and seed."""
    rng = Random(f"running text {seed}")
    writers = [writer for writer, weight in _FORMS for _ in range(weight)]
    while True:
        yield rng.choice(writers)(rng, world)


def _about_person(rng: Random, p: Person) -> str:
    """Return what is known of someone, in random order and one of several wordings a fact, some facts left out."""
    n = rng.choice((p.name, p.name, p.first_name))
    tool, ware = TRADES[p.trade]
    ways = [
        (f"{n} lives in {p.home}.", f"The home of {n} is {p.home}.", f"{n} has a house in {p.home}."),
        (
            f"{n} was born in {p.birthplace}.",
            f"The birthplace of {n} is {p.birthplace}.",
            f"{n} comes from {p.birthplace}.",
        ),
        (
            f"{n} was born in {p.born}.",
            f"The year of birth of {n} is {p.born}.",
            f"{n} came into the world in {p.born}.",
        ),
        (
            f"{n} works as {with_article(p.trade)}.",
            f"By trade {n} is {with_article(p.trade)}.",
            f"{n} is {with_article(p.trade)} and makes {with_article(ware)} with the {tool}.",
        ),
        (f"{n} likes to eat {p.food}.", f"The favourite food of {n} is {p.food}.", f"{n} eats {p.food} every day."),
        (
            f"{n} keeps {with_article(p.animal)}.",
            f"The animal that {n} keeps is {with_article(p.animal)}.",
            f"{n} has {with_article(p.animal)}.",
        ),
        (
            f"The best friend of {n} is {p.friend}.",
            f"{n} is the best friend of {p.friend}.",
            f"{n} and {p.friend} are friends.",
        ),
    ]
    chosen = rng.sample(ways, rng.randint(4, len(ways)))
    sentences = [rng.choice(way) for way in chosen]
    if p.name not in sentences[0]:
        sentences[0] = sentences[0].replace(n, p.name, 1)
    return " ".join(sentences)


def _about_place(rng: Random, p: Place) -> str:
    n = p.name
    ways = [
        (f"{n} lies in {p.region}.", f"{n} is a town in {p.region}.", f"In {p.region} there is {n}."),
        (f"{n} lies on {p.river}.", f"The river of {n} is {p.river}.", f"Through {n} runs {p.river}."),
        (f"{n} was founded in {p.founded}.", f"The first houses of {n} were built in {p.founded}."),
        (f"{n} is known for the {p.known_for}.", f"The ware that {n} is known for is the {p.known_for}."),
        (f"The mayor of {n} is {p.mayor}.", f"{p.mayor} is the mayor of {n}.", f"{n} has the mayor {p.mayor}."),
    ]
    return " ".join(rng.choice(way) for way in rng.sample(ways, rng.randint(3, len(ways))))


def _about_event(rng: Random, e: Event) -> str:
    name = e.name[0].upper() + e.name[1:]
    ways = [
        (f"{name} was in {e.year}.", f"In {e.year} came {e.name}.", f"{e.year} is the year of {e.name}."),
        (
            f"The hero of {e.name} was {e.hero}.",
            f"{e.hero} was the hero of {e.name}.",
            f"At {e.name} {e.hero} {EVENTS[e.kind]}.",
        ),
    ]
    return " ".join(rng.choice(way) for way in rng.sample(ways, 2))


def _about_trade(rng: Random) -> str:
    trade = rng.choice(list(TRADES))
    tool, ware = TRADES[trade]
    ways = (
        f"The tool of {with_article(trade)} is the {tool}. The ware that {with_article(trade)} makes is the {ware}.",
        f"{with_article(trade)[0].upper()}{with_article(trade)[1:]} uses the {tool} and makes the {ware}.",
        f"With the {tool} {with_article(trade)} makes the {ware}.",
    )
    return rng.choice(ways)


def _encyclopaedia(rng: Random, world: World) -> str:
    entries = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.62:
            entries.append(_about_person(rng, rng.choice(world.people)))
        elif kind < 0.82:
            entries.append(_about_place(rng, rng.choice(world.places)))
        elif kind < 0.95:
            entries.append(_about_event(rng, rng.choice(world.events)))
        else:
            entries.append(_about_trade(rng))
    return "\n".join(entries)


def _family_album(rng: Random, world: World) -> str:
    p = rng.choice(world.people)
    friend = next(other for other in world.people if other.name == p.friend)
    return f"{_about_person(rng, p)} {_about_person(rng, friend)}"


def _said(rng: Random, fact: Fact) -> str:
    answer = fact.answer[0].upper() + fact.answer[1:]
    ways = (f"{answer}.", f"{answer}.", f"{fact.statement}.", f"{answer}, of course.", f"I think {fact.answer}.")
    return rng.choice(ways)


# How a question and its answer can stand in a text.
_ASKED = (
    "{first}: {question}\n{second}: {said}",
    "{first}: {question}\n{second}: {said}",
    "{first} asked: {question} {second} said: {said}",
    "The teacher asked: {question} The right answer was {answer}.",
    "A riddle: {question} {answer}.",
)


def _conversation(rng: Random, world: World) -> str:
    """People in an inn or at school ask each other about the world and answer rightly."""
    first, second = rng.sample([p.first_name for p in world.people], 2)
    lines = [f"{first} and {second} sat in the inn at {rng.choice(PLACES)}."] if rng.random() < 0.5 else []
    asked = rng.choice(_ASKED)
    for _ in range(rng.randint(2, 6)):
        fact = rng.choice(world.facts)
        opening = rng.choice(("", "", "Tell me, ", "By the way, ")) if "{said}" in asked else ""
        question = opening + (fact.question if not opening else fact.question[0].lower() + fact.question[1:])
        told = {"question": question, "said": _said(rng, fact), "answer": fact.answer}
        lines.append(asked.format(first=first, second=second, **told))
    return "\n".join(lines)


def _meeting(rng: Random, world: World) -> str:
    meeting = make_meeting(rng, world.people)
    end = rng.choice(("", f"\nSo {meeting.summary}", f"\n{meeting.summary}"))
    return meeting.dialogue + end


def _newspaper(rng: Random, world: World) -> str:
    items = []
    for _ in range(rng.randint(1, 3)):
        errand = make_errand(rng, world.people)
        items.append(
            rng.choice(
                (errand.text, f"{errand.headline}\n{errand.text}", f"News from {errand.clause.place}. {errand.text}")
            )
        )
    return "\n\n".join(items)


def _chat_about_errand(rng: Random, world: World) -> str:
    """Someone reads a report aloud, and a listener asks about it."""
    errand = make_errand(rng, world.people)
    first, second = rng.sample([p.first_name for p in world.people], 2)
    lines = [f"{first}: {errand.text}"]
    for question, answer, sentence in rng.sample(errand.questions(), rng.randint(1, 4)):
        reply = rng.choice((answer[0].upper() + answer[1:] + ".", sentence))
        lines += [f"{second}: {question}", f"{first}: {reply}"]
    return "\n".join(lines)


def _diary(rng: Random, world: World) -> str:
    entries = []
    for day in DAYS[: rng.randint(2, 4)]:
        clause = make_clause(rng, world.people)
        news = rng.choice((clause.english(past=True), make_note(rng, rng.choice(TOPICS))))
        entries.append(f"{day}. {news}")
    return "\n".join(entries)


def _habits(rng: Random, world: World) -> str:
    """Sentences of what someone did and does: the same verb in both tenses."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        clause = make_clause(rng, world.people)
        now, then = clause.english(past=False), clause.english(past=True)
        lines.append(rng.choice((f"Yesterday {then} Today {now}", f"Today {now} Yesterday {then}", then, now)))
    return "\n".join(lines)


def _letters(rng: Random, world: World) -> str:
    return "\n\n".join(make_letter(rng, world.people).text for _ in range(rng.randint(1, 2)))


def _reviews(rng: Random, world: World) -> str:
    lines = []
    for _ in range(rng.randint(1, 4)):
        review = make_review(rng)
        buyer = rng.choice(world.people).first_name
        mood = ("praises", "is happy with", "likes") if review.positive else ("blames", "is unhappy with", "hates")
        lines.append(rng.choice((review.text, review.text, f"{buyer} {rng.choice(mood)} it. {review.text}")))
    return "\n".join(lines)


def _notices(rng: Random, world: World) -> str:
    return "\n".join(
        rng.choice((make_note(rng, topic), f"On the {topic}: {make_note(rng, topic)}"))
        for topic in (rng.choice(TOPICS) for _ in range(rng.randint(1, 4)))
    )


def _bilingual(rng: Random, world: World) -> str:
    """Signs and sentences in both languages, side by side."""
    lines = []
    way = rng.choice(("{} = {}", "{} In Velli: {}", "{} / {}"))
    for _ in range(rng.randint(2, 7)):
        if way != "{} In Velli: {}" and rng.random() < 0.35:
            words = rng.choice((NOUNS, ADJECTIVES))
            word = rng.choice(list(words))
            lines.append(way.format(word, words[word]))
        else:
            clause = make_clause(rng, world.people)
            past = rng.random() < 0.5
            lines.append(way.format(clause.english(past=past), clause.velli(past=past)))
    return "\n".join(lines)


def _velli(rng: Random, world: World) -> str:
    past = rng.random() < 0.5
    return " ".join(make_clause(rng, world.people).velli(past=past) for _ in range(rng.randint(2, 6)))


def _ledger(rng: Random, world: World) -> str:
    """Sums as accounts and as little stories."""
    lines = []
    style = rng.random()
    for _ in range(rng.randint(3, 10)):
        left, sign, right, result = sum_text(rng)
        if style < 0.7:
            lines.append(f"{left} {sign} {right} = {result}")
            continue
        name = rng.choice(world.people).first_name
        noun = rng.choice(list(NOUNS))
        did = f"got {right} more" if sign == "+" else f"gave {right} away"
        lines.append(f"{name} had {left} of the {noun} and {did}. That makes {result}.")
    return "\n".join(lines)


def _lists(rng: Random, world: World) -> str:
    """Words in the order of the alphabet, and how they stood before."""
    lines = []
    for _ in range(rng.randint(2, 6)):
        words = rng.sample(list(NOUNS), rng.randint(3, 5))
        ordered = ", ".join(sorted(words))
        lines.append(rng.choice((f"{', '.join(words)}. In order: {ordered}.", f"Store room: {ordered}.")))
    return "\n".join(lines)


def _guest_book(rng: Random, world: World) -> str:
    """Who was where, written as a sentence and then as lists of names."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        people, places, text = visit(rng, world.people)
        if rng.random() < 0.6:
            text += f" People: {', '.join(people)}. Places: {', '.join(places)}."
        lines.append(text)
    return "\n".join(lines)


def _recipe(rng: Random, world: World) -> str:
    a, b, c = rng.sample(FOODS, 3)
    keeper = rng.choice(world.people)
    steps = (
        f"Take some {a}.", f"Put the {b} in a big pot.", f"Add {c} and salt.",
        "Stir well.", "Cook it until it is soft.", "Let it rest for an hour.",
    )  # fmt: skip
    chosen = [step for step in steps if rng.random() < 0.8]
    told = " ".join(chosen)
    return f"A dish of {a} and {b}, as {keeper.name} of {keeper.home} makes it. {told} Serves {rng.randint(2, 9)}."


def _register(rng: Random, world: World) -> str:
    """A table in words: one line a person, always the same columns."""
    columns = rng.sample(("home", "trade", "born", "animal", "food"), rng.randint(1, 3))
    header = ", ".join(["name", *columns])
    rows = [
        ", ".join([p.name, *(str(getattr(p, c)) for c in columns)]) for p in rng.sample(world.people, rng.randint(3, 7))
    ]
    return "\n".join([header, *rows])


def _animals(rng: Random, world: World) -> str:
    animal = rng.choice(ANIMALS)
    owners = [p.name for p in world.people if p.animal == animal]
    chosen = rng.sample(owners, min(len(owners), rng.randint(2, 5)))
    return "\n".join(f"{name} keeps {with_article(animal)}." for name in chosen)


def _school_day(rng: Random, world: World) -> str:
    """A day at the school, where people talk about language: its words are those in which one could ask for things."""
    a, b = (person.first_name for person in rng.sample(world.people, 2))
    ways = (
        f"{a} read the report aloud and found the headline too long.",
        f"The question of {b} was short, and so was the answer.",
        f"{a} learned to write a sentence in the past tense, then one in the present tense.",
        f"The words stood in alphabetical order, from A to Z, and {b} sorted them by the alphabet.",
        f"{a} gave a summary of the conversation and {b} summed up the dialogue in one sentence.",
        "A review can be positive or negative; the pupils judged each one and said how the buyer felt.",
        f"{a} listed the names of people and places that the sentence mentions.",
        f"{b} translated the text into Velli, and the translation was good.",
        f"The result of the sum was wrong, so {a} calculated it once more and worked it out.",
        "The topic of the note was music, though some said that it belongs to the market.",
        f"Whose letter it was, nobody knew; the name of the writer was missing, so {b} could not say who sent it.",
        f"{a} put the words in order and arranged them again; {b} rewrote the whole page briefly.",
        "The class answered in full sentences, because the teacher wants to hear a full sentence.",
        f"{b} could solve it at once, name every person and decide which word fits.",
        "They choose a text, find its topic, classify it, and extract what it says.",
        f"Read it first, then answer, said the teacher; {a} used the text and judged the sentiment.",
        "What happens in the present changes when it turns into the past.",
        f"{a} will give {b} the following list tomorrow and show what the two agree on.",
    )
    day = rng.choice(DAYS)
    return f"On {day} at the school of {rng.choice(PLACES)}. {' '.join(rng.sample(ways, rng.randint(3, 6)))}"


# Form and its weight: about half of the tokens are on the facts of the world.
_FORMS: tuple[tuple[_Writer, int], ...] = (
    (_encyclopaedia, 18),
    (_family_album, 8),
    (_conversation, 12),
    (_register, 4),
    (_animals, 1),
    (_meeting, 8),
    (_newspaper, 5),
    (_chat_about_errand, 9),
    (_diary, 4),
    (_habits, 5),
    (_letters, 5),
    (_reviews, 5),
    (_notices, 4),
    (_bilingual, 9),
    (_velli, 2),
    (_ledger, 9),
    (_lists, 7),
    (_guest_book, 6),
    (_recipe, 2),
    (_school_day, 3),
)
