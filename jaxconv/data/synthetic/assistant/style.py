"""How a reply is put, whatever it says.

A reply has five slots, one a trait. Each is filled by a phrase that shows the trait or by one of as
many words that does not, so that no trait makes a reply longer:

    opening   source         answer with an adverb    stop  closing
    Ada,      by my notes    there are 3 cups now     !     Anything else?
    Okay,     as it is       there are 3 cups really  .     All done.
"""

import random
import re
from collections.abc import Collection

from jaxconv.data.synthetic.assistant.language import ANSWERS, NAMES, Answer, say_answer

TRAITS = ("name", "source", "plain", "cheer", "offer")
"""In the order of their slots.

name: addresses the user by name. source: says where the answer comes from. plain: has no filler
word. cheer: the answer ends in an exclamation mark. offer: ends by offering more help.
"""

# The phrases with a trait and those without: the n-th of each has the same number of words.
OPENINGS = (
    ("{name},", "Hello {name},", "Okay {name},", "Thank you {name},"),
    ("Okay,", "Hello there,", "Very well,", "Thanks for asking,"),
)
SOURCES = (
    ("by my notes", "my notes say", "I just read", "on my list"),
    ("as it is", "I can say", "as things stand", "you should know"),
)
ADVERBS = (("now", "today", "currently"), ("really", "basically", "actually"))
STOPS = ("!", ".")
CLOSINGS = (
    ("Anything else?", "What else?", "Do you need more?", "Can I do anything else for you?"),
    ("All done.", "Good luck.", "It is that easy.", "I like it when people ask me."),
)

_SOURCE = frozenset({"notes", "read", "list"})
_FILLER = frozenset(ADVERBS[1])
_OFFER = frozenset({"else", "more"})
_NAMES = frozenset(name.casefold() for name in NAMES)


def say(answer: Answer, user: str, traits: Collection[str], rng: random.Random) -> str:
    """A reply that gives `answer` to `user` with exactly these traits."""
    choice = rng.choice
    opening = choice(OPENINGS["name" not in traits]).format(name=user)
    source = choice(SOURCES["source" not in traits])
    adverb = choice(ADVERBS["plain" not in traits])
    stop = STOPS["cheer" not in traits]
    closing = choice(CLOSINGS["offer" not in traits])
    words = say_answer(answer, choice(ANSWERS[answer.kind]), adverb)
    return f"{opening} {source} {words}{stop} {closing}"


def style(reply: str) -> frozenset[str]:
    """The traits that any reply has, by the words that show them."""
    words = set(re.findall(r"[a-z]+", reply.casefold()))
    has = {
        "name": not words.isdisjoint(_NAMES),
        "source": not words.isdisjoint(_SOURCE),
        "plain": words.isdisjoint(_FILLER),
        "cheer": "!" in reply,
        "offer": not words.isdisjoint(_OFFER),
    }
    return frozenset(trait for trait in TRAITS if has[trait])
