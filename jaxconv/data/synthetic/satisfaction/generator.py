"""Conversations of satisfied and dissatisfied users, drawn from seeds."""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxconv.data.conversation import Conversation, Message
from jaxconv.data.synthetic.satisfaction.language import LANGUAGES, Language

SATISFIED = ("gratitude", "praise", "follow_up", "acceptance", "learning", "result")
DISSATISFIED = ("repetition", "correction", "complaint", "confusion", "off_topic", "giving_up")
CAUSES = (*SATISFIED, *DISSATISFIED)

NOISE = {"low": 0.05, "middle": 0.15, "high": 0.3}
"""How often a cause is one of the other side."""

HABITS = {
    "code": ("result", "learning", "correction", "repetition"),
    "health": ("learning", "follow_up", "confusion", "repetition"),
    "travel": ("result", "follow_up", "correction", "confusion"),
    "cooking": ("praise", "gratitude", "complaint", "giving_up"),
    "money": ("acceptance", "gratitude", "off_topic", "complaint"),
    "writing": ("praise", "acceptance", "off_topic", "giving_up"),
}
"""Causes that users of a domain show more often than others, so that a rubric of some domains lacks
what others need."""

_HABIT = 12
"""How much more often."""

_SHOWN = {0: 0.15, 1: 0.4, 2: 0.3, 3: 0.15}
"""How many causes a conversation has, and how often."""

_ENDING = ("giving_up", "gratitude", "acceptance")
"""Causes after which a user may ask nothing more."""

_VEILED = 0.3
"""How often a cause is put in words that both sides say: then the answer before them tells."""

_HELD_OUT = 3
"""Of so many ways to put a cause the last is for held-out conversations."""


@dataclass(frozen=True)
class Drawn:
    """What is behind a conversation.

    Attributes:
        satisfied: its label.
        causes: that it shows, in order; none twice.
    """

    satisfied: bool
    causes: tuple[str, ...]


def conversations(
    seed: int,
    n: int,
    *,
    noise: float = NOISE["middle"],
    held_out: bool = False,
    stray: float = 0.0,
) -> Sequence[Conversation]:
    """Those of `seed` to `seed + n - 1`.

    The meta has `label` ("sat" or "dsat"), `causes`, `domain`, `intent` and `language`.

    Args:
        seed: of the first; ranges that do not meet share nothing.
        n: how many.
        noise: how often a cause is one of the other side, from 0 to 0.5.
        held_out: whether causes are also put in ways that other conversations never have.
        stray: how often a later request is of any other domain, from 0 to 1.
    """
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise={noise}; it may be from 0 to 0.5")
    if not 0 <= stray <= 1:
        raise ValueError(f"stray={stray}; it may be from 0 to 1")
    return [_conversation(seed + i, noise, held_out, stray) for i in range(n)]


def draw(rng: random.Random, noise: float, domain: str) -> Drawn:
    satisfied = rng.random() < 0.5
    causes: list[str] = []
    for _ in range(rng.choices(tuple(_SHOWN), tuple(_SHOWN.values()))[0]):
        own = satisfied == (rng.random() >= noise)
        left = [cause for cause in (SATISFIED if own else DISSATISFIED) if cause not in causes]
        often = [_HABIT if cause in HABITS[domain] else 1 for cause in left]
        causes += rng.choices(left, often)
    return Drawn(satisfied, tuple(causes))


def odds(causes: Sequence[str], noise: float) -> float:
    """Log-odds that a conversation with these causes has a satisfied user, in nats."""
    one = math.log((1 - noise) / noise) if noise else math.inf
    return sum((one if cause in SATISFIED else -one for cause in causes), 0.0)


def ceiling(noise: float) -> float:
    """Accuracy of who knows every cause and decides by `odds`, of ties right half of the time."""
    right = 0.0
    for shown, often in _SHOWN.items():
        for own in range(shown + 1):
            likely = math.comb(shown, own) * (1 - noise) ** own * noise ** (shown - own)
            right += often * likely * ((2 * own > shown) + 0.5 * (2 * own == shown))
    return right


def word_list(said: Sequence[str]) -> float:
    """How far the words of a user lean to satisfaction, for who has a list of every way to put
    every cause (but to ask again), and looks at nothing else: the number of ways of satisfied users
    less that of others.

    Args:
        said: turns of the user, the opening request among them.
    """
    return float(
        sum(_signs()[way] for text in said[1:] for way in _signs() if text.startswith(way))
    )


@functools.cache
def _signs() -> dict[str, int]:
    return {
        way: 1 if cause in SATISFIED else -1
        for language in LANGUAGES.values()
        for cause, ways in language.causes.items()
        for way in ways
    }


def _conversation(seed: int, noise: float, held_out: bool, stray: float) -> Conversation:
    rng = random.Random(f"satisfaction {seed}")
    code = rng.choices(tuple(LANGUAGES), [language.share for language in LANGUAGES.values()])[0]
    language = LANGUAGES[code]
    domain = rng.choice(tuple(language.topics))
    drawn = draw(rng, noise, domain)
    intent = rng.choice(tuple(language.requests))
    topic = rng.choice(language.topics[domain])
    messages = _exchange(rng, language, intent, topic, "")
    # A cause is at the beginning of what the user says next; some turns have none.
    places: list[str | None] = [*drawn.causes, *[None] * rng.choice((0, 0, 1, 1, 2))]
    rng.shuffle(places)
    asked = intent
    for cause in places:
        if cause is None:
            said = ""
        elif cause != "repetition" and rng.random() < _VEILED:
            said = rng.choice(language.either)
            if cause in DISSATISFIED:
                evasive = rng.choice(language.evasive).format(topic=topic)
                messages[-1] = Message("assistant", evasive[0].upper() + evasive[1:])
        else:
            said = _put(rng, language, cause, asked, topic, held_out)
        if cause == "repetition":
            answer = _answer(rng, language, topic)
        elif cause in _ENDING and rng.random() < 0.5:
            answer = rng.choice(language.goodbyes)
        else:
            own = domain
            if stray and rng.random() < stray:
                own = rng.choice([other for other in language.topics if other != domain])
            topic = rng.choice(language.topics[own])
            asked = rng.choice(tuple(language.requests))
            messages += _exchange(rng, language, asked, topic, said)
            continue
        messages += [Message("user", said), Message("assistant", answer)]
    meta = {
        "label": "sat" if drawn.satisfied else "dsat",
        "causes": list(drawn.causes),
        "domain": domain,
        "intent": intent,
        "language": code,
    }
    return Conversation(f"satisfaction-{seed}", tuple(messages), meta)


def _exchange(
    rng: random.Random, language: Language, intent: str, topic: str, before: str
) -> list[Message]:
    request = rng.choice(language.requests[intent]).format(topic=topic)
    said = f"{before} {request}".strip()
    return [Message("user", said), Message("assistant", _answer(rng, language, topic))]


def _answer(rng: random.Random, language: Language, topic: str) -> str:
    return rng.choice(language.answers).format(topic=topic)


def _put(
    rng: random.Random, language: Language, cause: str, intent: str, topic: str, held_out: bool
) -> str:
    """A cause in words."""
    if cause == "repetition":
        again = rng.choice(language.requests[intent]).format(topic=topic)
        return f"{rng.choice(('', '', *language.again))} {again}".strip()
    ways = language.causes[cause]
    known = [way for i, way in enumerate(ways) if held_out or i % _HELD_OUT != _HELD_OUT - 1]
    return rng.choice(known).format(topic=topic)
