"""Small word problems with worked answers, made up by rule: text that a very small model can learn
within a minute, that does not repeat itself, and that a reader can follow.

An answer takes some words from its question and puts others around them, in one of several ways.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

PEOPLE = (
    ("Anna", "she", "her"), ("Ben", "he", "him"), ("Clara", "she", "her"), ("David", "he", "him"),
    ("Emma", "she", "her"), ("Felix", "he", "him"), ("Greta", "she", "her"), ("Hugo", "he", "him"),
)  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pears", "shells", "stamps")
PLACES = ("at the market", "behind the house", "in the garden", "near the river", "on the beach")
BEGIN = ("{a} has {n} {t} in a box.", "{a}'s bag holds {n} {t}.", "{a} collects {n} {t} {p}.")
#: what happens: (sign, the question's sentence, sentences of the answer)
EVENTS = (
    (1, "{b} brings {him} {k} more.", (
        "{b} brings {k}, which makes {n} + {k} = {m}.",
        "Together with the {k} from {b} there are {n} + {k} = {m}.")),
    (1, "Then {he} buys {k} more {p}.", (
        "Buying {k} more makes {n} + {k} = {m}.",
        "{a} buys {k} {p}, and {n} + {k} = {m}.")),
    (1, "Later {he} finds another {k} {p}.", (
        "With the {k} found {p} it is {n} + {k} = {m}.",
        "Finding {k} more makes {n} + {k} = {m}.")),
    (-1, "Then {he} gives {k} of them to {b}.", (
        "Without the {k} for {b} there are {n} - {k} = {m} left.",
        "{a} gives {k} away, so {n} - {k} = {m} are left.")),
    (-1, "Later {he} loses {k} {p}.", (
        "Losing {k} leaves {n} - {k} = {m}.",
        "{k} are lost {p}, and {n} - {k} = {m} remain.")),
    (-1, "{b} needs {k} of them and takes them home.", (
        "{b} takes {k} home, which leaves {n} - {k} = {m}.",
        "After {b} has taken {k}, {n} - {k} = {m} remain.")),
)  # fmt: skip
ASK = ("How many {t} does {a} have now?", "How many {t} are there in the end?")
START = ("At first there are {n} {t}.", "{a} starts with {n} {t}.")
END = ("So {a} has {n} {t} now.", "The answer is {n} {t}.")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str


def problems(seed: int) -> Iterator[Problem]:
    """Without end, and each question once."""
    chance, seen = random.Random(seed), set()
    while True:
        made = _problem(chance)
        if made.question not in seen:
            seen.add(made.question)
            yield made


def _problem(chance: random.Random) -> Problem:
    (a, he, him), (b, *_) = chance.sample(PEOPLE, 2)
    words = {"a": a, "b": b, "he": he, "him": him, "t": chance.choice(THINGS)}
    n = chance.randint(20, 40)  # more than three can take away
    asked = [chance.choice(BEGIN).format(**words, n=n, p=chance.choice(PLACES))]
    told = [chance.choice(START).format(**words, n=n)]
    for sign, event, answers in chance.sample(EVENTS, chance.choice((2, 2, 3))):
        k = chance.randint(2, 6)
        own = {**words, "n": n, "k": k, "m": n + sign * k, "p": chance.choice(PLACES)}
        asked.append(event.format(**own))
        told.append(chance.choice(answers).format(**own))
        n += sign * k
    asked.append(chance.choice(ASK).format(**words))
    told.append(chance.choice(END).format(**words, n=n))
    return Problem(" ".join(asked), " ".join(told))
