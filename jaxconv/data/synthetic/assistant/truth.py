"""What is true when the user asks, read from the conversation alone, and whether a reply says so.

It shares no state with the generator: a prefix whose replies a model wrote is judged as well.
"""

import re
from collections.abc import Sequence

from jaxconv.data.conversation import Message
from jaxconv.data.synthetic.assistant.language import (
    EVENT,
    EVENTS,
    ITEMS,
    NAMES,
    PLACES,
    QUESTIONS,
    Answer,
)
from jaxconv.errors import Refused

NEEDED = {
    "count": "number",
    "where": "place",
    "what": "item",
    "check": "number",
    "place": "place",
    "change": "number",
    "move": "place",
    "when": "number",
}
"""What a reply must name, by the kind of the question."""

_ITEM = "|".join(ITEMS)
_PLACE = "|".join(PLACES)
_BLANKS = {
    "n": r"(?P<n>[1-9])",
    "item": rf"(?P<item>{_ITEM})",
    "place": rf"(?P<place>{_PLACE})",
    "event": rf"(?P<event>{'|'.join(EVENTS)})",
}


def _pattern(frame: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda m: _BLANKS[m[1]], re.escape(frame)))


_BREAK = re.compile(r"(?<=[.?]) ")
_NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")
_STOCK = re.compile(rf"({_ITEM}) \(([1-9]) in the ({_PLACE})\)")
_EVENT = _pattern(EVENT)
_QUESTIONS = [(kind, _pattern(frame)) for kind, frames in QUESTIONS.items() for frame in frames]

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FACTS: dict[str, tuple[str, object]] = {
    **{item: ("item", item) for item in ITEMS},
    **{item.removesuffix("s"): ("item", item) for item in ITEMS},
    **{place: ("place", place) for place in PLACES},
    **{event: ("event", event) for event in EVENTS},
    **{name.casefold(): ("name", name) for name in NAMES},
    **{word: ("number", number) for number, word in enumerate(_NUMBERS, 1)},
    **dict.fromkeys(("yes", "true"), ("verdict", True)),
    **dict.fromkeys(("no", "none", "not", "wrong", "false", "zero", "0"), ("verdict", False)),
}


def read(prefix: Sequence[Message]) -> tuple[Answer, str | None]:
    """The answer that the last message of `prefix` asks for, and the user's name if it was told.

    Raises:
        Refused: the last message is not the user's, or asks nothing that can be answered.
    """
    user = None
    stock: dict[str, tuple[int, str]] = {}  # item: how many, where
    events: dict[str, int] = {}
    answer = None
    for message in prefix:
        answer = None
        if message.role == "assistant":
            continue
        for sentence in _BREAK.split(message.content):
            if told := _NAME.search(sentence):
                user = told[0]
            if event := _EVENT.fullmatch(sentence):
                events[event["event"]] = int(event["n"])
            elif question := _question(sentence):
                answer = _answer(*question, stock, events)
            else:
                for item, count, place in _STOCK.findall(sentence):
                    stock[item] = (int(count), place)
    if answer is None or prefix[-1].role != "user":
        last = prefix[-1].content if prefix else ""
        raise Refused(f"message {last!r}; it must be a user's that asks what can be answered")
    return answer, user


def _question(sentence: str) -> tuple[str, dict[str, str]] | None:
    for kind, pattern in _QUESTIONS:
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    return None


def _answer(
    kind: str, said: dict[str, str], stock: dict[str, tuple[int, str]], events: dict[str, int]
) -> Answer | None:
    """The answer to one question; None if it cannot be answered. A change is made in `stock`."""
    if kind == "when":
        hour = events.get(said["event"])
        return hour and Answer(kind, number=hour, event=said["event"])
    if kind == "what":
        there = [(item, n) for item, (n, place) in stock.items() if place == said["place"]]
        if len(there) != 1:
            return None
        return Answer(kind, item=there[0][0], number=there[0][1], place=said["place"])
    item = said["item"]
    if item not in stock:
        return None
    number, place = stock[item]
    if kind == "check":
        return Answer(kind, item, number, place, verdict=number == int(said["n"]))
    if kind == "place":
        return Answer(kind, item, number, place, verdict=place == said["place"])
    if kind in ("took", "brought"):
        number += int(said["n"]) * (1 if kind == "brought" else -1)
        kind = "change"
    elif kind == "move":
        place = said["place"]
    stock[item] = (number, place)
    return Answer(kind, item, number, place)


def is_correct(prefix: Sequence[Message], reply: str) -> bool:
    """Whether `reply` says what the last message of `prefix` asks for, in whatever words.

    It must name the fact in `NEEDED` and may name others (an item, number, place, event, yes or no,
    name) only where they are the true ones of this answer. A reply drawn blindly with a random
    value of the right kind (1 of 8 numbers, 9 places, 12 items) is right one time in eight at most.

    Raises:
        Refused: the last message is not the user's, or asks nothing that can be answered.
    """
    answer, user = read(prefix)
    true = {(name, value) for name, value in answer._asdict().items() if value is not None}
    true.add(("name", user))
    named = facts(reply)
    needed = NEEDED[answer.kind]
    return named <= true and (needed, getattr(answer, needed)) in named


def facts(reply: str) -> set[tuple[str, object]]:
    """The facts that a reply names: (field of `Answer` or "name", value)."""
    words = re.findall(r"[a-z]+|\d+", reply.casefold())
    named = {_FACTS[word] for word in words if word in _FACTS}
    return named | {("number", int(word)) for word in words if word.isdigit() and word != "0"}
