"""A generator of random numbers and the world arrive; small happenings leave, told in several forms.

What happens in a scene is made up on the spot and contradicts no fact of the world: who meets whom, who carried what.
Running text and tasks are both made of scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from keeptune.lab.lexicon import ADJECTIVES, DAYS, FOODS, NOUNS, PLACES, SPOTS, TOPICS, VERBS
from keeptune.lab.world import Clause, Person

_ACTIVITIES = (
    "pick plums", "mend the fence", "paint the boat", "bake bread", "practise the flute", "sell pears", "wash the cart",
    "build a shed", "catch fish", "plant beans", "look for the key", "draw a map", "count the sheep", "clean the well",
    "play cards", "carry stones", "make candles", "cut wood",
)  # fmt: skip
CLOSINGS = ("Yours,", "With love,", "Write soon,", "Your friend,")
_HOURS = ("at dawn", "in the morning", "at noon", "in the afternoon", "in the evening")
_GOOD: tuple[str, ...] = (
    "It works very well", "I am very happy with it", "It is worth every coin", "It looks beautiful",
    "I would buy it again", "Everyone at home loves it", "It is better than I hoped", "It never let me down",
    "The work is careful and strong", "It was a pleasure from the first day",
)  # fmt: skip
_BAD: tuple[str, ...] = (
    "It broke after two days", "I am very unhappy with it", "It is a waste of money", "It looks terrible",
    "I would never buy it again", "Everyone at home hates it", "It is worse than I feared", "It let me down at once",
    "The work is careless and weak", "It was a disappointment from the first day",
)  # fmt: skip
_NEUTRAL = ("I bought it in {place}", "It came on {day}", "It is {adjective}", "I wanted one for the market")
_NOTES = {
    "building": (
        "The roof beams are up", "The masons need more stones", "The new wall is two feet high",
        "The mortar is still wet", "They laid the floor of the hall", "The scaffold stands since {day}",
        "The carpenters cut the door frame", "The bricks came by cart",
    ),
    "harvest": (
        "The barley is ripe", "We picked plums until dark", "The hay is in the barn", "Eleven sacks of beans are full",
        "The apples are sweet this year", "The reapers start on {day}", "The vines are heavy with grapes",
        "They threshed the wheat",
    ),
    "market": (
        "The stalls open at seven", "A basket of eggs costs four coins", "The cheese sold out by noon",
        "The traders came on {day}", "Honey is dear this week", "Two buyers argued over the price of a coat",
        "The fish seller gave us a discount", "The stall rent goes up",
    ),
    "music": (
        "The choir sings on {day}", "The fiddler broke a string", "They practised the old dance tune",
        "The drum was too loud", "The flute players need new sheets", "The song has five verses",
        "The band plays in the square", "Her voice is higher than before",
    ),
    "school": (
        "The pupils learn to write", "The lesson starts at eight", "The teacher read a story",
        "Homework is due on {day}", "The children count to one hundred", "The blackboard is cracked",
        "Nine pupils passed the exam", "The class drew maps",
    ),
    "weather": (
        "It rained all night", "The fog lifted before noon", "A storm comes from the coast", "The snow is melting",
        "The wind turned on {day}", "The sky is clear and cold", "There was frost on the grass",
        "Thunder woke us twice",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two people agree on where, when and what for."""

    first: str
    second: str
    spot: str
    place: str
    day: str
    activity: str
    lines: tuple[str, ...]

    @property
    def matter(self) -> str:
        """What the two agree on, less the day: no two meetings of one matter may stand in train and test."""
        return f"{self.activity} {self.place} {self.spot}"

    @property
    def dialogue(self) -> str:
        return "\n".join(self.lines)

    @property
    def summary(self) -> str:
        return (
            f"{self.first} and {self.second} will meet at the {self.spot} in {self.place} on {self.day} "
            f"to {self.activity}."
        )

    def questions(self) -> tuple[tuple[str, str], ...]:
        """Return questions, each with its answer as a span of the dialogue."""
        return (
            ("On which day will they meet?", self.day),
            ("At which spot will they meet?", self.spot),
            ("In which town will they meet?", self.place),
            ("What will the two do?", self.activity),
            ("Who asks first?", self.first),
        )


@dataclass(frozen=True, slots=True)
class Review:
    """What a buyer thinks of a thing; `opinions` are the sentences that say it."""

    noun: str
    opinions: tuple[str, ...]
    text: str
    positive: bool


@dataclass(frozen=True, slots=True)
class Errand:
    """Somebody did something with a thing somewhere on a day, and somebody else helped: who, what, where, when."""

    clause: Clause
    day: str
    helper: str
    cost: int
    text: str

    @property
    def thing(self) -> str:
        adjective = f"{self.clause.adjective} " if self.clause.adjective else ""
        return f"the {adjective}{self.clause.noun}"

    @property
    def headline(self) -> str:
        return f"{self.clause.subject} {self.clause.verb.present} {self.thing} in {self.clause.place}"

    def spans(self) -> list[tuple[str, str]]:
        """Return questions, each with its answer as a span of the text."""
        return [(question, answer) for question, answer, _ in self.questions()]

    def questions(self) -> tuple[tuple[str, str, str], ...]:
        """Return questions, each with its answer as a span of the text and as a whole sentence."""
        c = self.clause
        did = f"{c.verb.past} {self.thing}"
        return (
            (f"Who {did}?", c.subject, f"{c.subject} {did}."),
            (f"What did {c.subject} {c.verb.plain}?", self.thing, f"{c.subject} {did}."),
            ("Where did it happen?", f"{c.place}", f"It happened in {c.place}."),
            ("On which day did it happen?", self.day, f"It happened on {self.day}."),
            ("Who helped?", self.helper, f"{self.helper} helped."),
            ("How many coins did it cost?", str(self.cost), f"It cost {self.cost} coins."),
        )


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter from one person to another; its news may be a report."""

    writer: str
    written_in: str | None
    errand: Errand | None
    text: str

    def questions(self) -> Sequence[tuple[str, str]]:
        """Return questions, none of them on the writer, each with its answer as a span of the letter."""
        news = self.errand.spans() if self.errand else []
        return [("In which town was the letter written?", self.written_in), *news] if self.written_in else news


def make_clause(rng: Random, people: Sequence[Person], *, placed: bool | None = None) -> Clause:
    """Return a sentence about someone; `placed` says whether it names a place (None: by chance)."""
    with_place = rng.random() < 0.5 if placed is None else placed
    return Clause(
        subject=rng.choice(people).first_name,
        verb=rng.choice(VERBS),
        noun=rng.choice(list(NOUNS)),
        adjective=rng.choice(list(ADJECTIVES)) if rng.random() < 0.6 else None,
        place=rng.choice(PLACES) if with_place else None,
    )


def make_meeting(rng: Random, people: Sequence[Person]) -> Meeting:
    """Return a dialogue in which two people agree, often after another proposal was turned down."""
    first, second = rng.sample(sorted({person.first_name for person in people}), 2)
    spot, other_spot = rng.sample(SPOTS, 2)
    day, other_day = rng.sample(DAYS, 2)
    place, activity = rng.choice(PLACES), rng.choice(_ACTIVITIES)
    lines = [
        rng.choice(
            (
                f"{first}: Shall we {activity} together?",
                f"{first}: I want to {activity} in {place}. Will you come?",
                f"{first}: Do you have time to {activity} with me?",
                f"{first}: Good morning, {second}. We could {activity} this week.",
            )
        ),
        rng.choice(
            (f"{second}: Gladly. When?", f"{second}: Yes, on which day?", f"{second}: Why not? Tell me the day.")
        ),
    ]
    if rng.random() < 0.5:
        lines += [
            f"{first}: What about {other_day}?",
            rng.choice(
                (
                    f"{second}: On {other_day} I am busy. {day} is better.",
                    f"{second}: No, {other_day} is bad for me. Let us say {day}.",
                )
            ),
        ]
    else:
        lines += [f"{first}: {day} would be good.", f"{second}: {day} is fine."]
    if rng.random() < 0.4:
        lines += [f"{first}: Then at the {other_spot}?", f"{second}: Better at the {spot} in {place}."]
    else:
        lines += [
            rng.choice(
                (f"{first}: Let us meet at the {spot} in {place}.", f"{first}: I will be at the {spot} in {place}.")
            ),
        ]
    lines.append(rng.choice((f"{first}: Good.", f"{second}: I will be there.", f"{second}: See you then.")))
    return Meeting(first, second, spot, place, day, activity, tuple(lines))


def make_review(rng: Random) -> Review:
    """Return two to five sentences on a thing, some of which say nothing for or against it."""
    positive = rng.random() < 0.5
    noun = rng.choice(list(NOUNS))
    opening = rng.choice(
        (
            f"About the {noun}:",
            f"I bought a new {noun}.",
            f"We have had the {noun} for a month.",
            f"My {noun} came today.",
        )
    )
    sentences = rng.sample(_GOOD if positive else _BAD, rng.randint(1, 2))
    opinions = tuple(sentences)
    for _ in range(rng.randint(0, 2)):
        filler = rng.choice(_NEUTRAL).format(
            place=rng.choice(PLACES), day=rng.choice(DAYS), adjective=rng.choice(list(ADJECTIVES))
        )
        sentences.insert(rng.randint(0, len(sentences)), filler)
    return Review(noun, opinions, f"{opening} {'. '.join(sentences)}.", positive)


def make_note(rng: Random, topic: str) -> str:
    """Return two to four sentences on a topic; one of them may tell of a place or of food instead."""
    assert topic in TOPICS
    sentences = [text.format(day=rng.choice(DAYS)) for text in rng.sample(_NOTES[topic], rng.randint(2, 3))]
    if rng.random() < 0.6:
        sentences.insert(
            rng.randint(0, len(sentences)),
            rng.choice((f"I heard it in {rng.choice(PLACES)}", f"We ate {rng.choice(FOODS)} {rng.choice(_HOURS)}")),
        )
    return ". ".join(sentences) + "."


def make_errand(rng: Random, people: Sequence[Person]) -> Errand:
    """Return a short report of what someone did, its sentences in varying order."""
    clause = make_clause(rng, people, placed=True)
    helper = rng.choice([p.first_name for p in people if p.first_name != clause.subject])
    day, hour, cost = rng.choice(DAYS), rng.choice(_HOURS), rng.randint(2, 60)
    did = clause.english(past=True)
    opening = rng.choice((f"On {day} {did}", f"{did} That was on {day}.", f"It was {day}. {did}"))
    rest = [
        rng.choice((f"{helper} helped.", f"{helper} lent a hand.", f"The help of {helper} was welcome.")),
        rng.choice((f"It cost {cost} coins.", f"The price was {cost} coins.", f"They paid {cost} coins for it.")),
        rng.choice((f"All was done {hour}.", "The neighbours watched.", f"Then they ate {rng.choice(FOODS)}.")),
    ]
    rng.shuffle(rest)
    return Errand(clause, day, helper, cost, f"{opening} {' '.join(rest)}")


def make_letter(rng: Random, people: Sequence[Person]) -> Letter:
    """Return a letter with a greeting, some news and the writer's name."""
    writer, reader = rng.sample(people, 2)
    errand = None if rng.random() < 0.5 else make_errand(rng, people)
    news = errand.text if errand else make_note(rng, rng.choice(TOPICS))
    greeting = rng.choice(("Dear", "Hello", "My dear"))
    closing = rng.choice(CLOSINGS)
    place = rng.choice(PLACES)
    middle = rng.choice((f"I write to you from {place}.", "Thank you for your letter.", "How are you?"))
    text = f"{greeting} {reader.first_name},\n{middle} {news}\n{closing}\n{writer.name}"
    return Letter(writer.name, place if place in middle else None, errand, text)


def sum_text(rng: Random) -> tuple[int, str, int, int]:
    """Return a small sum: left number, operator, right number and result, all from 0 to 99."""
    left, right = rng.randint(1, 98), rng.randint(1, 98)
    if left + right <= 99 and rng.random() < 0.6:
        return left, "+", right, left + right
    left, right = max(left, right), min(left, right)
    return left, "-", right, left - right


def visit(rng: Random, people: Sequence[Person]) -> tuple[list[str], list[str], str]:
    """Return the people and the places of a sentence, in its order, and the sentence."""
    names = [p.name for p in rng.sample(people, 3)]
    places = rng.sample(PLACES, 2)
    a, b, c = names
    x, y = places
    noun, day = rng.choice(list(NOUNS)), rng.choice(DAYS)
    ways = (
        ([a, b], [x], f"{a} met {b} in {x} on {day}."),
        ([a], [x, y], f"{a} went from {x} to {y} with the {noun}."),
        ([a, b], [x, y], f"In {x} {a} bought the {noun} for {b}, who waits in {y}."),
        ([a], [x], f"On {day} {a} came to {x} for the {noun}."),
        ([a, b, c], [x], f"{a}, {b} and {c} shared the {noun} in {x}."),
        ([a, b], [x, y], f"From {x} {a} wrote to {b} in {y} about the {noun}."),
    )
    if rng.random() < 0.2:
        p = rng.choice(people)
        return [p.name], [p.home], f"{p.name} lives in {p.home}."
    return rng.choice(ways)
