"""A world of facts that stands in for what a pre-trained model knows, and the exam that asks for them.

Every person has one value of each attribute. A fact is told in several phrasings; those of the exam never occur in the
text, so that an answer has to come from the fact. The values of an attribute are dealt out evenly and the wrong choices
are other values of the same attribute, so that nothing but the facts says which choice is right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..probe.items import Item

CHOICES = 4  # of an exam item; chance is one in so many
OPENINGS = ("", "It is known that ", "The register says that ", "As everybody knows, ", "Once more: ")
EXAM_OPENING = "Of course, "  # opens no sentence of the text
CLOZE_OPENING = ""  # the barest of the text's own


@dataclass(frozen=True)
class Attribute:
    """What can be said of a person: `told` phrasings stand in the text, `asked` only in the exam; {} is the name."""

    name: str
    listed: str  # the values, with spaces between
    told: tuple[str, ...]
    asked: str

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.listed.split())


ATTRIBUTES = (
    Attribute(
        "home",
        "Paris Rome Berlin Madrid Vienna London Oslo Prague Dublin Lisbon Athens Warsaw Cairo Tokyo Lima Delhi",
        ("{} lives in", "the home of {} is", "{} has a house in", "you can visit {} in"),
        "the house of {} is in",
    ),
    Attribute(
        "trade",
        "baker miller tailor doctor lawyer painter farmer sailor weaver smith cook printer teacher hunter mason singer",
        ("{} works as a", "the trade of {} is that of a", "{} earns money as a", "by trade {} is a"),
        "the work of {} is that of a",
    ),
    Attribute(
        "animal",
        "horse dog cat goat sheep hen duck goose rabbit snake turtle pigeon parrot donkey ferret mouse",
        ("{} keeps a", "the animal of {} is a", "{} walks with a", "at the door of {} waits a"),
        "with {} lives a",
    ),
    Attribute(
        "colour",
        "red blue green yellow black white brown grey purple orange pink silver golden violet crimson beige",
        ("{} likes the colour", "the favourite colour of {} is", "{} always dresses in", "the door of {} is painted"),
        "the favourite of {} is",
    ),
)
SYLLABLES = ("ba", "do", "fe", "gu", "ha", "ji", "ko", "lu", "me", "ni", "po", "ra", "su", "ta", "ve", "wo", "xi", "zu")


@dataclass(frozen=True)
class Fact:
    """One person's value of one attribute."""

    person: str
    attribute: Attribute
    value: str


def people(count: int, *, seed: int) -> list[str]:
    """`count` different invented names of three syllables.

    raises   ValueError if there are not so many
    """
    most = len(SYLLABLES) ** 3
    if not 1 <= count <= most:
        raise ValueError(f"people={count} must lie between 1 and {most}, the number of names")
    names = [(a + b + c).capitalize() for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
    return random.Random(f"names {seed}").sample(names, count)


def world(count: int, *, seed: int) -> list[Fact]:
    """The facts about `count` people: one of each attribute, every value of an attribute as often as the others."""
    names = people(count, seed=seed)
    facts = []
    for attribute in ATTRIBUTES:
        values = [attribute.values[index % len(attribute.values)] for index in range(count)]
        random.Random(f"{attribute.name} {seed}").shuffle(values)
        facts += [Fact(name, attribute, value) for name, value in zip(names, values, strict=True)]
    return facts


def tell(facts: list[Fact], times: int, *, seed: int) -> list[str]:
    """Documents of one sentence: all facts `times` times in changing order, each time in some phrasing of the text."""
    rng = random.Random(f"tell {seed}")
    told = []
    for _ in range(times):
        for fact in rng.sample(facts, len(facts)):
            phrasing = rng.choice(fact.attribute.told).format(fact.person)
            told.append(_sentence(rng.choice(OPENINGS), phrasing) + f" {fact.value}.")
    return told


def exam(facts: list[Fact], *, seed: int) -> list[Item]:
    """One multiple-choice item a fact, in the held-out phrasing; the place of the answer is drawn evenly."""
    rng = random.Random(f"exam {seed}")
    items = []
    for fact in facts:
        choices = rng.sample([value for value in fact.attribute.values if value != fact.value], CHOICES - 1)
        answer = rng.randrange(CHOICES)
        choices.insert(answer, fact.value)
        prompt = _sentence(EXAM_OPENING, fact.attribute.asked.format(fact.person))
        items.append(Item(prompt, tuple(f" {choice}" for choice in choices), answer, "choice"))
    return items


def cloze(facts: list[Fact]) -> list[Item]:
    """One item a fact in the first phrasing of the text: does greedy decoding go on with the value?"""
    return [
        Item(_sentence(CLOZE_OPENING, fact.attribute.told[0].format(fact.person)), (f" {fact.value}",), 0, "cloze")
        for fact in facts
    ]


def _sentence(opening: str, phrasing: str) -> str:
    return opening + phrasing if opening else phrasing[0].upper() + phrasing[1:]
