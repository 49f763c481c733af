"""Conversations and preference pairs of the help desk, drawn from seeds."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxconv.data.conversation import Conversation, Message, PreferencePair
from jaxconv.data.synthetic.assistant.language import (
    BRIEFS,
    COUNTS,
    EVENT,
    EVENTS,
    GREETINGS,
    GUESTS,
    INTRODUCTIONS,
    ITEMS,
    LISTS,
    NAMES,
    PLACES,
    QUESTIONS,
    SITES,
    Answer,
    say_list,
)
from jaxconv.data.synthetic.assistant.style import TRAITS, say
from jaxconv.errors import Refused

EXCHANGES = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}
"""How many a conversation has, and how often."""

KINDS = {
    "count": 4,
    "where": 4,
    "what": 3,
    "check": 1,
    "place": 1,
    "change": 3,
    "move": 2,
    "when": 4,
}
"""Kinds of questions, and how often each is tried."""


def is_held_out(item: str, count: int, place: str) -> bool:
    """Whether so many of an item at a place are a fact for held-out conversations only.

    One in five combinations is; training conversations never say one, nor imply one by a change or
    a wrong assumption. Each item, count, place and pair of them is in both.
    """
    return (ITEMS.index(item) + PLACES.index(place) + count) % 5 == 0


def is_held_out_event(event: str, hour: int) -> bool:
    """Whether an event at an hour is a fact for held-out conversations only, one in five."""
    return (EVENTS.index(event) + hour) % 5 == 0


_COUNTS = {
    (item, place, held_out): [n for n in COUNTS if is_held_out(item, n, place) == held_out]
    for item in ITEMS
    for place in PLACES
    for held_out in (False, True)
}
_HOURS = {
    (event, held_out): [n for n in COUNTS if is_held_out_event(event, n) == held_out]
    for event in EVENTS
    for held_out in (False, True)
}


@dataclass(slots=True)
class Scene:
    """What is true in a conversation while it is being made.

    Attributes:
        stock: how many of each item there are, and where; no two items share a place.
        events: the hour of each event that the user has told.
        asked: (kind, item or event) of the questions so far.
    """

    rng: random.Random
    held_out: bool
    user: str
    stock: dict[str, tuple[int, str]]
    events: dict[str, int] = field(default_factory=dict)
    asked: set[tuple[str, str | None]] = field(default_factory=set)

    def may_say(self, item: str, count: int, place: str) -> bool:
        return count in COUNTS and (self.held_out or not is_held_out(item, count, place))


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    things = rng.choice((1, 1, 1, 2, 2, 3))
    stock = {
        item: (rng.choice(_COUNTS[item, place, held_out]), place)
        for item, place in zip(rng.sample(ITEMS, things), rng.sample(PLACES, things), strict=True)
    }
    return Scene(rng, held_out, rng.choice(NAMES), stock)


def tell_event(scene: Scene) -> str:
    """The user mentions when something is."""
    event = scene.rng.choice([event for event in EVENTS if event not in scene.events])
    scene.events[event] = scene.rng.choice(_HOURS[event, scene.held_out])
    return EVENT.format(event=event, n=scene.events[event])


def ask(scene: Scene, known: Sequence[str]) -> tuple[str, Answer]:
    """A new question, or a change that the user reports and that is made, with its answer.

    `known` are the events that were told in earlier messages.
    """
    while True:
        kind = scene.rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        drawn = _draw(scene, kind, known)
        if drawn is None:
            continue
        frames, said, answer = drawn
        about = (kind, answer.event or answer.item)
        if about in scene.asked:
            continue
        scene.asked.add(about)
        if kind in ("change", "move"):
            scene.stock[answer.item] = (answer.number, answer.place)
        text = scene.rng.choice(QUESTIONS[frames]).format(
            n=said.get("n"),
            item=answer.item,
            place=said.get("place"),
            event=answer.event,
        )
        return text, answer


def _draw(
    scene: Scene, kind: str, known: Sequence[str]
) -> tuple[str, dict[str, Any], Answer] | None:
    """Which of `QUESTIONS` to ask, the number and place said in it, and the answer.

    None if the draw cannot be asked.
    """
    rng, stock = scene.rng, scene.stock
    if kind == "when":
        if not known:
            return None
        event = rng.choice(known)
        return kind, {}, Answer(kind, event=event, number=scene.events[event])
    item = rng.choice(tuple(stock))
    count, place = stock[item]
    answer = Answer(kind, item=item, number=count, place=place)
    if kind in ("count", "where"):
        return kind, {}, answer
    if kind == "what":
        return kind, {"place": place}, answer
    if kind in ("check", "place") and rng.random() < 0.4:
        return kind, {"n": count, "place": place}, answer._replace(verdict=True)
    if kind == "check":
        n = rng.choice([n for n in COUNTS if n != count])
        if not scene.may_say(item, n, place):
            return None
        return kind, {"n": n}, answer._replace(verdict=False)
    if kind == "change":
        n = rng.choice((1, 1, 2))
        frames, now = rng.choice((("took", count - n), ("brought", count + n)))
        if not scene.may_say(item, now, place):
            return None
        return frames, {"n": n}, answer._replace(number=now)
    taken = {where for _, where in stock.values()}  # so that "what is there?" has one answer
    there = rng.choice([place for place in PLACES if place not in taken])
    if not scene.may_say(item, count, there):
        return None
    if kind == "place":
        return kind, {"place": there}, answer._replace(verdict=False)
    return kind, {"place": there}, answer._replace(place=there)


def open_conversation(scene: Scene) -> tuple[list[Message], list[str]]:
    """The system message, if there is one, and what the user says before the first question.

    One of the two says what there is and who the user is.
    """
    rng = scene.rng
    stock = say_list(scene.stock)
    if rng.random() < 0.4:
        introduction = rng.choice(INTRODUCTIONS).format(name=scene.user)
        return [], [introduction, rng.choice(LISTS).format(list=stock)]
    brief = rng.choice(BRIEFS).format(site=rng.choice(SITES), list=stock)
    if rng.random() < 0.5:
        guest = rng.choice(GUESTS).format(name=scene.user)
        said = [rng.choice(GREETINGS)] if rng.random() < 0.3 else []
        return [Message("system", f"{brief} {guest}")], said
    return [Message("system", brief)], [rng.choice(INTRODUCTIONS).format(name=scene.user)]


def draw_traits(rng: random.Random) -> list[str]:
    """Each trait with a chance of a half, independently."""
    return [trait for trait in TRAITS if rng.random() < 0.5]


def converse(rng: random.Random, held_out: bool) -> tuple[Scene, list[Message], list[Answer]]:
    """A whole conversation and the answers that its replies give; styles are mixed."""
    scene = draw_scene(rng, held_out)
    messages, said = open_conversation(scene)
    answers: list[Answer] = []
    for _ in range(rng.choices(tuple(EXCHANGES), tuple(EXCHANGES.values()))[0]):
        known = tuple(scene.events)
        if rng.random() < 0.4 and len(known) < 2:
            said.append(tell_event(scene))
        question, answer = ask(scene, known)
        messages.append(Message("user", " ".join([*said, question])))
        messages.append(Message("assistant", say(answer, scene.user, draw_traits(rng), rng)))
        answers.append(answer)
        said = []
    return scene, messages, answers


def conversations(seed: int, n: int, *, held_out: bool = False) -> list[Conversation]:
    """Those of the seeds `seed` to `seed + n - 1`, for supervised fine-tuning.

    Args:
        seed: first seed.
        n: how many.
        held_out: made of the facts that training conversations never say (`is_held_out`).

    Returns:
        Conversations of one to four exchanges, most of them with a system message. `meta` has
        "user" (the name) and "kinds" (of the questions, see `language.Answer`).
    """
    out = []
    for at in range(seed, seed + n):
        scene, messages, answers = converse(random.Random(at), held_out)
        meta = {"user": scene.user, "kinds": [answer.kind for answer in answers]}
        out.append(Conversation(_id(at, held_out), tuple(messages), meta))
    return out


def prompts(conversation: Conversation) -> list[tuple[Message, ...]]:
    """What comes before each of the assistant's replies."""
    messages = conversation.messages
    return [messages[:i] for i, message in enumerate(messages) if message.role == "assistant"]


def pairs(
    seed: int, n: int, *, traits: Collection[str], noise: float = 0.0, held_out: bool = False
) -> list[PreferencePair]:
    """Two correct replies to one prompt, of which the one with the planted traits is chosen.

    Both are drawn alike but for the planted traits: wording and other traits are independent, and
    no trait makes a reply longer. The prompts are those of `conversations` from the same seeds, cut
    before one of the replies.

    Args:
        seed: first seed.
        n: how many.
        traits: every chosen reply has all of them, a rejected one has none.
        noise: share of pairs whose labels are exchanged, 0 to 1, each pair by itself.
        held_out: made of the facts that training conversations never say (`is_held_out`).

    Returns:
        Pairs; `meta` has "kind" (of the question) and "noisy".

    Raises:
        Refused: no trait, an unknown one, or noise that is not a share.
    """
    if not traits or not set(traits) <= set(TRAITS):
        raise Refused(f"traits={traits!r}; they may be some of {', '.join(TRAITS)}")
    if not 0 <= noise <= 1:
        raise Refused(f"noise={noise}; it may be 0 to 1")
    out = []
    for at in range(seed, seed + n):
        rng = random.Random(at)
        scene, messages, answers = converse(rng, held_out)
        cut = rng.randrange(len(answers))
        answer = answers[cut]
        replies = [
            say(answer, scene.user, [t for t in draw_traits(rng) if t not in traits] + planted, rng)
            for planted in (list(traits), [])
        ]
        noisy = rng.random() < noise
        chosen, rejected = (
            (Message("assistant", reply),) for reply in replies[:: -1 if noisy else 1]
        )
        prompt = tuple(messages[: len(messages) - 2 * (len(answers) - cut) + 1])
        meta = {"kind": answer.kind, "noisy": noisy}
        out.append(PreferencePair(_id(at, held_out), prompt, chosen, rejected, meta))
    return out


def swap(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """The null control: chosen and rejected are exchanged in a random half (rounded down)."""
    exchanged = set(random.Random(seed).sample(range(len(pairs)), len(pairs) // 2))
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i in exchanged else pair
        for i, pair in enumerate(pairs)
    ]


def _id(seed: int, held_out: bool) -> str:
    return f"assistant-{'held-out-' if held_out else ''}{seed}"
