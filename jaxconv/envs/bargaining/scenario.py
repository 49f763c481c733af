"""What a bargaining episode is about, drawn from a seed: who is there, what is on the table, who
wants what, and below which number of points each one should rather walk away.

Two kinds. In a *division* a pool of books, hats and balls is shared out; each agent gives every
item an integer value such that the whole pool is worth 10 to it. In *terms* the agents settle two
or three issues as low, middle or high; each agent wants one end of every issue and weighs the
issues with integers that sum to 10; the middle gives half. So a deal is worth 0 to 10 to everyone.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import product

KINDS = ("division", "terms")
ITEMS = ("book", "hat", "ball")
ISSUES = ("price", "fee", "bonus", "deposit", "budget")
OPTIONS = ("low", "middle", "high")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMES = ("Ann", "Bob", "Cal", "Dan", "Eve", "Gus", "Ida", "Kim", "Leo", "Mia", "Sam", "Tom")
OCCUPATIONS = ("baker", "clerk", "cook", "farmer", "guard", "nurse", "pilot", "tailor")
TRAITS = ("polite", "curious", "frank", "terse", "calm")
POINTS = 10  # what everything together is worth to each agent
MAX_PLAYERS = 5

# Division: one tuple of item counts for each agent. Terms: one option index for each issue.
Offer = tuple[tuple[int, ...], ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """What everybody knows. `counts` is how many there are of each topic; empty for terms."""

    kind: str
    agents: tuple[str, ...]
    topics: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Private:
    """What one agent alone knows.

    `values` are points for one piece of each item, or the weight of each issue; `wants` is the
    option index wanted for each issue (empty in a division); `limit` is the reservation value: a
    deal worth fewer points is worse than none.
    """

    values: tuple[int, ...]
    wants: tuple[int, ...]
    limit: int
    trait: str
    occupation: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole episode before anybody spoke. `private` stands in seat order.

    Nobody is told `utterances`, the number after which the talk is over, so that no one knows to
    have the last word; `first` is the seat that begins.
    """

    setting: Setting
    private: tuple[Private, ...]
    utterances: int
    first: int


def utility(private: Private, seat: int, offer: Offer) -> float:
    """Points, 0 to 10, that `offer` is worth to the agent in `seat`."""
    if private.wants:
        wants = zip(private.values, private.wants, offer, strict=True)
        return sum(weight * (2 - abs(want - option)) for weight, want, option in wants) / 2
    book, hat, ball = private.values
    books, hats, balls = offer[seat]
    return float(book * books + hat * hats + ball * balls)


@cache
def valuations(counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All integer values with which `counts` of things are worth 10 and at least two matter."""
    ranges = (range(POINTS // count + 1) for count in counts)
    return tuple(
        values
        for values in product(*ranges)
        if sum(c * v for c, v in zip(counts, values, strict=True)) == POINTS
        and sum(v > 0 for v in values) >= 2
    )


@cache
def _pools(players: int) -> tuple[tuple[int, ...], ...]:
    """Pools of 1 to 4 of each item with enough pieces to go round and enough ways to value them."""
    return tuple(
        counts
        for counts in product(range(1, 5), repeat=len(ITEMS))
        if players + 2 <= sum(counts) <= players + 6 and len(valuations(counts)) >= 4
    )


def draw(
    seed: int, players: tuple[int, ...], kinds: tuple[str, ...], turns: tuple[int, int]
) -> Scenario:
    """The scenario of `seed`: players and kind among those given, 'turns' per agent inclusive."""
    rng = random.Random(seed)
    count = rng.choice(players)
    kind = rng.choice(kinds)
    agents = tuple(rng.sample(NAMES, count))
    wants: list[tuple[int, ...]]
    if kind == "division":
        counts = rng.choice(_pools(count))
        setting = Setting(kind, agents, ITEMS, counts)
        values = [rng.choice(valuations(counts)) for _ in agents]
        wants = [()] * count
        highest = max(2, 11 // count)  # with more to feed, nobody can insist on as much
    else:
        topics = tuple(rng.sample(ISSUES, rng.choice((2, 3))))
        setting = Setting(kind, agents, topics, ())
        values = [rng.choice(valuations((1,) * len(topics))) for _ in agents]
        wants = [tuple(rng.choice((0, 2)) for _ in topics) for _ in agents]
        highest = 5
    private = tuple(
        Private(
            values[seat],
            wants[seat],
            rng.randint(highest // 2, highest),
            rng.choice(TRAITS),
            rng.choice(OCCUPATIONS),
        )
        for seat in range(count)
    )
    utterances = rng.randint(turns[0] * count, turns[1] * count)
    return Scenario(setting, private, utterances, rng.randrange(count))
