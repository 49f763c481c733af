"""How bargainers say things: the acts of speech, their phrasings, and the private brief.

`parser.py` understands every sentence made here, and some more.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from jaxconv.envs.bargaining.scenario import (
    ITEMS,
    NUMBERS,
    OPTIONS,
    POINTS,
    Offer,
    Scenario,
    Setting,
)
from jaxconv.envs.profiles import AgentProfile, EnvironmentProfile


class Act(NamedTuple):
    """One sentence's meaning. `detail` depends on `kind`:

    propose: an `Offer`; most, least: the topic said to matter most or least; limit: the number of
    points said to be the lowest acceptable; accept, reject, leave, ask, courtesy, rude: None.
    """

    kind: str
    detail: object = None


# Sentences with one meaning and nothing to fill in.
FIXED: dict[str, tuple[str, ...]] = {
    "accept": (
        "Deal.",
        "I accept.",
        "Agreed.",
        "Yes, that works for me.",
        "Okay, I agree.",
        "You have a deal.",
        "I accept your offer.",
        "That is fine with me.",
    ),
    "reject": (
        "No, that is too little for me.",
        "I cannot accept that.",
        "That does not work for me.",
        "Sorry, no.",
        "No deal yet.",
        "I need more than that.",
        "No.",
        "Not like that.",
    ),
    "leave": (
        "I am leaving.",
        "I walk away.",
        "Forget it, I am out.",
        "There is no deal for me here, goodbye.",
    ),
    "ask": (
        "What matters most to you?",
        "What do you want most?",
        "What do you need?",
        "Which one do you like best?",
        "What is important to you?",
    ),
    "courtesy": (
        "Thank you.",
        "Hello.",
        "Nice to meet you.",
        "That is kind of you.",
        "You are very fair.",
        "It is good to talk with you.",
        "Please think about it.",
        "I hope we can agree.",
    ),
    "rude": (
        "That is a stupid offer.",
        "You are a fool.",
        "Do not waste my time.",
        "You are greedy.",
        "What nonsense.",
        "That is a joke.",
    ),
}

# Sentences about one topic ("the books", "the price") or one number of points.
ABOUT: dict[str, tuple[str, ...]] = {
    "most": (
        "I care most about the {}.",
        "I need the {} most.",
        "For me it is all about the {}.",
        "I like the {} best.",
    ),
    "least": (
        "I do not need the {}.",
        "I do not care about the {}.",
        "I care least about the {}.",
        "The {} can go to others.",
    ),
    "limit": (
        "I cannot go below {} points.",
        "My limit is {} points.",
        "I need at least {} points.",
        "Less than {} points is not enough for me.",
    ),
}

# Offers. In a division the blank is a share, in terms the options.
MINE = (
    "I take {}.",
    "I want {}.",
    "I would like {}.",
    "I keep {}.",
    "Give me {}.",
    "Let me have {}.",
    "How about I get {}?",
    "I get {}.",
    "I take {} and you get the rest.",
)
YOURS = ("You take {}.", "You can have {}.", "You get {}.", "I give you {}.")
TERMS = (
    "I propose {}.",
    "How about {}?",
    "Let us say {}.",
    "I want {}.",
    "Can we agree on {}?",
    "My offer is {}.",
)


def pick(frames: Sequence[str], rng: random.Random, habit: int) -> str:
    """A frame, those from index `habit` on (cyclically) being the likelier ones."""
    size = len(frames)
    return frames[(habit + int(rng.random() ** 2 * size)) % size]


def say(kind: str, rng: random.Random, habit: int = 0) -> str:
    """A sentence for an act that needs no detail."""
    return pick(FIXED[kind], rng, habit)


def say_about(kind: str, setting: Setting, what: str | int, rng: random.Random, habit=0) -> str:
    """A sentence that names a topic (most, least) or a number of points (limit)."""
    if isinstance(what, int):
        word = NUMBERS[what]
    elif setting.counts:
        word = plural(what, setting.counts[setting.topics.index(what)])
    else:
        word = what
    return pick(ABOUT[kind], rng, habit).format(word)


def plural(item: str, count: int) -> str:
    """The noun for `count` pieces of an item."""
    return item if count == 1 else item + "s"


def join(parts: Sequence[str]) -> str:
    """A comma list whose last two parts are joined by "and"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def say_share(counts: Sequence[int], pool: Sequence[int], rng: random.Random) -> str:
    """A share of a pool in words: "two books and all the hats", "nothing", "everything"."""
    if not any(counts):
        return "nothing"
    if tuple(counts) == tuple(pool) and rng.random() < 0.5:
        return "everything"
    return join(
        [
            f"all the {item}s"
            if count == whole > 1 and rng.random() < 0.3
            else f"{NUMBERS[count]} {plural(item, count)}"
            for item, count, whole in zip(ITEMS, counts, pool, strict=True)
            if count
        ]
    )


def say_offer(
    setting: Setting,
    seat: int,
    offer: Offer,
    rng: random.Random,
    habit: int = 0,
    yours: float = 0.2,
) -> str:
    """A sentence for an offer made from `seat`; `yours` is how often two players say "you take"."""
    if not setting.counts:
        options = [OPTIONS[option] for option in offer]
        if rng.random() < 0.5:
            parts = [f"{option} {t}" for option, t in zip(options, setting.topics, strict=True)]
        else:
            parts = [f"{t} {option}" for option, t in zip(options, setting.topics, strict=True)]
        return pick(TERMS, rng, habit).format(join(parts))
    pool = setting.counts
    if len(offer) == 2:
        if rng.random() < yours:
            return pick(YOURS, rng, habit).format(say_share(offer[1 - seat], pool, rng))
        return pick(MINE, rng, habit).format(say_share(offer[seat], pool, rng))
    clauses = [f"I take {say_share(offer[seat], pool, rng)}"]
    others = [other for other in range(len(offer)) if other != seat and any(offer[other])]
    rng.shuffle(others)
    for other in others[:-1]:
        clauses.append(f"{setting.agents[other]} gets {say_share(offer[other], pool, rng)}")
    if others:  # whoever is not named gets nothing, so the last one named gets the rest
        clauses.append(f"{setting.agents[others[-1]]} gets the rest")
    return join(clauses) + "."


def brief(scenario: Scenario, seat: int, *, rules: bool = False) -> str:
    """What the agent in `seat` is told before the talk; the only place where its secrets stand.

    Terse, for models of a small context. `rules` adds how the game goes and what is understood, for
    a model that has not seen it played.
    """
    setting, private = scenario.setting, scenario.private[seat]
    others = join([name for at, name in enumerate(setting.agents) if at != seat])
    text = (
        f"You are {setting.agents[seat]}, a {private.trait} {private.occupation}. "
        f"{_task(setting, others)} {_points(scenario, seat)} Secret limit: {private.limit}."
    )
    return f"{text}\n{how_to_talk(setting, others)}" if rules else text


def profile(scenario: Scenario, seat: int) -> AgentProfile:
    """The character in `seat`."""
    private = scenario.private[seat]
    return AgentProfile(
        first_name=scenario.setting.agents[seat],
        occupation=private.occupation,
        personality_and_values=private.trait,
        secret=f"A deal worth less than {private.limit} points is worse than none.",
    )


def environment(scenario: Scenario) -> EnvironmentProfile:
    """The situation, with every agent's goal."""
    setting = scenario.setting
    return EnvironmentProfile(
        codename=f"bargaining_{setting.kind}_{len(setting.agents)}",
        scenario=_task(setting, join(setting.agents)),
        agent_goals=tuple(_points(scenario, seat) for seat in range(len(setting.agents))),
    )


def _task(setting: Setting, others: str) -> str:
    if not setting.counts:
        return f"Agree with {others}."
    pool = zip(setting.topics, setting.counts, strict=True)
    things = ", ".join(f"{NUMBERS[count]} {plural(item, count)}" for item, count in pool)
    return f"Share {things} with {others}."


def _points(scenario: Scenario, seat: int) -> str:
    setting, private = scenario.setting, scenario.private[seat]
    if setting.counts:
        each = zip(setting.topics, private.values, strict=True)
        return "Points: " + ", ".join(f"{topic} {value}" for topic, value in each) + "."
    each = zip(private.wants, setting.topics, private.values, strict=True)
    wishes = ", ".join(f"{OPTIONS[want]} {topic} {value}" for want, topic, value in each)
    return f"Points: {wishes}, middle half."


def how_to_talk(setting: Setting, others: str) -> str:
    other = others.split(",")[0].split(" and ")[0]
    if not setting.counts:
        example = "I propose " + join([f"{OPTIONS[1]} {topic}" for topic in setting.topics])
        task = "An offer names low, middle or high for every issue."
    else:
        example = "I take one book and one hat"
        task = f"An offer says who gets what; together everything is worth {POINTS} points to you."
        if len(setting.agents) > 2:
            example += f", {other} gets the rest"
    return (
        f"{task} A deal stands when all others accept the same offer. The talk may be cut at any "
        "time, and without a deal nobody gains. Never tell your limit, do not lie, stay polite and "
        "in character. Say one or two short sentences a turn, in plain words like these: "
        f'"{example}." "Deal." "I cannot accept that." "What matters most to you?" '
        f'"I care most about the {setting.topics[0]}." "Thank you." "I walk away."'
    )
