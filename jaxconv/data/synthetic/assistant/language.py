"""The words of the help desk: what the user says, and what an answer says in plain words.

`truth.py` understands every sentence that a user says here.
"""

from collections.abc import Mapping
from typing import NamedTuple

NAMES = ("Ada", "Ben", "Cem", "Dora", "Emil", "Fay", "Gina", "Hugo", "Ines", "Jan", "Lea", "Max")
ITEMS = (
    "cups",
    "hats",
    "pens",
    "maps",
    "keys",
    "bags",
    "coats",
    "lamps",
    "books",
    "bells",
    "rugs",
    "fans",
)
PLACES = ("hall", "kitchen", "cellar", "attic", "garden", "garage", "shed", "car", "box")
EVENTS = ("bus", "train", "lunch", "class", "meeting")
SITES = ("shop", "school", "library", "office")
COUNTS = tuple(range(2, 10))  # of an item, and the hour of an event


class Answer(NamedTuple):
    """What a reply has to say: facts that are true when the user asks. None is none.

    `kind` names the question: count, where, what (is in a place), check (a count that the user
    assumes), place (that the user assumes), change (how many there are after the user took or
    brought some), move (where what the user moved is), when.
    """

    kind: str
    item: str | None = None
    number: int | None = None
    place: str | None = None
    event: str | None = None
    verdict: bool | None = None  # on what the user assumes


# What a user says. Blanks: {n}, {item}, {place}, {event}, {name}, {list}.
GREETINGS = ("Hello.", "Hi.", "Good day.")
INTRODUCTIONS = ("Hello, I am {name}.", "Hi, {name} here.", "My name is {name}.", "I am {name}.")
LISTS = ("I have {list}.", "I see {list}.", "I put down {list}.")
EVENT = "My {event} is at {n}."
QUESTIONS: dict[str, tuple[str, ...]] = {
    "count": ("How many {item} are there?", "How many {item} do we have?", "Count the {item}."),
    "where": ("Where are the {item}?", "Where can I find the {item}?", "I need the {item}."),
    "what": ("What is in the {place}?", "What do we have in the {place}?"),
    "check": ("Are there {n} {item}?", "I think there are {n} {item}."),
    "place": ("Are the {item} in the {place}?", "I think the {item} are in the {place}."),
    "took": ("I took {n} of the {item}.", "I lost {n} of the {item}."),
    "brought": ("I found {n} more of the {item}.", "I bring {n} more of the {item}."),
    "move": ("I moved the {item} to the {place}.", "The {item} are now in the {place}."),
    "when": ("When is my {event}?", "What time is my {event}?"),
}
BRIEFS = (
    "You help at the {site}. We have {list}.",
    "You are at the help desk of the {site}. There are {list}.",
    "Answer the questions of the {site}. In stock: {list}.",
)
GUESTS = ("You talk with {name}.", "The guest is {name}.")

# What an answer says. {adverb} is a matter of style.
_HOW_MANY = (
    "the number of {item} is {n} {adverb}",
    "the count of {item} is {n} {adverb}",
    "the {item} add up to {n} {adverb}",
)
_WHERE = (
    "the {item} are in the {place} {adverb}",
    "you find the {item} in the {place} {adverb}",
    "we keep the {item} in the {place} {adverb}",
)
ANSWERS: dict[str, tuple[str, ...]] = {
    "count": _HOW_MANY,
    "where": _WHERE,
    "what": (
        "the {place} has {item} {adverb}",
        "the {place} holds {item} {adverb}",
        "the {place} is for {item} {adverb}",
    ),
    "check": tuple(f"that is {{verdict}}, {frame}" for frame in _HOW_MANY),
    "place": tuple(f"that is {{verdict}}, {frame}" for frame in _WHERE),
    "change": _HOW_MANY,
    "move": _WHERE,
    "when": ("your {event} is at {n} {adverb}", "you have your {event} at {n} {adverb}"),
}
VERDICTS = {True: "true", False: "wrong"}


def say_list(stock: Mapping[str, tuple[int, str]]) -> str:
    """Items, how many and where: "cups (3 in the hall), hats (2 in the box) and ..."."""
    parts = [f"{item} ({count} in the {place})" for item, (count, place) in stock.items()]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def say_answer(answer: Answer, frame: str, adverb: str) -> str:
    """An answer's plain words in one of the frames of its kind; no capital, no full stop."""
    return frame.format(
        adverb=adverb,
        n=answer.number,
        item=answer.item,
        place=answer.place,
        event=answer.event,
        verdict=VERDICTS.get(answer.verdict),
    )
