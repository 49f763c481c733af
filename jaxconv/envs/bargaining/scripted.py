"""Players by rule: something to imitate for a warm start, and opponents of a known temper.

Each one aims at a number of points that sinks from turn to turn towards its limit, accepts what is
as good as its aim, and offers what reaches the aim and looks best for the others. Temperaments
differ in how high they start, how they give way, and how they talk. They are a little careless on
purpose (a repeated phrase, an unanswered question, now and then a slip of the tongue), so that a
model that learned from them has room to become better; yet every sentence is valid.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from jaxconv.data.conversation import Message
from jaxconv.envs.bargaining.env import Bargaining, Options
from jaxconv.envs.bargaining.language import say, say_about, say_offer
from jaxconv.envs.bargaining.rules import Table
from jaxconv.envs.bargaining.scenario import POINTS, Offer, Private, Scenario, Setting, utility
from jaxconv.envs.episode import Episode, play
from jaxconv.errors import Refused

_HORIZON = 3  # own turns after which a script has come down to its last aim


@dataclass(frozen=True, slots=True)
class Temperament:
    """How a script bargains and talks. All but `shape`, `patience` and `habit` are in [0, 1].

    Attributes:
        start, end: first and last aim, as a share of the way from the limit up to all it could get.
        shape: above 1 it gives way late, below 1 early.
        noise: standard deviation of the aim, in points per point of that way.
        mirror: above 0 the aim does not follow time; it sinks by this share of what others gave.
        patience: own turns before it may walk away from an offer below its limit.
        leave: how often it then does.
        ask, answer, tell: how often it asks, answers a question, tells its wishes unasked.
        lie: how often such a word is untrue.
        courtesy, rude, slip: how often it is kind, is rude, tells its limit, in a turn.
        refuse: how often it says no before a counter-offer.
        habit: which phrasings it likes.
    """

    start: float
    end: float
    shape: float
    noise: float = 0.08
    mirror: float = 0.0
    patience: int = 2
    leave: float = 0.1
    ask: float = 0.1
    answer: float = 0.5
    tell: float = 0.08
    lie: float = 0.05
    courtesy: float = 0.12
    rude: float = 0.03
    slip: float = 0.03
    refuse: float = 0.35
    habit: int = 0


TEMPERAMENTS: dict[str, Temperament] = {
    "greedy": Temperament(0.95, 0.22, 1.2, rude=0.15, lie=0.3, courtesy=0.03, answer=0.3),
    "fair": Temperament(0.65, 0.15, 1.0, ask=0.2, answer=0.75, courtesy=0.2, habit=1),
    "stubborn": Temperament(0.85, 0.38, 1.8, leave=0.2, answer=0.25, ask=0.04, rude=0.08, habit=2),
    "yielding": Temperament(0.6, 0.05, 0.6, courtesy=0.25, answer=0.65, refuse=0.15, habit=3),
    "chatty": Temperament(
        0.75, 0.2, 1.0, ask=0.35, answer=0.8, tell=0.3, courtesy=0.4, slip=0.12, habit=4
    ),
    "reciprocal": Temperament(0.8, 0.2, 1.0, mirror=0.8, ask=0.15, habit=5),
    "deadline": Temperament(0.9, 0.05, 4.0, ask=0.08, courtesy=0.08, habit=6),
}
HELD_OUT = ("reciprocal", "deadline")
TRAINING = tuple(name for name in TEMPERAMENTS if name not in HELD_OUT)


@lru_cache(maxsize=65536)
def _choices(
    counts: tuple[int, ...], values: tuple[int, ...], wants: tuple[int, ...]
) -> tuple[tuple[float, tuple[tuple[int, ...], ...]], ...]:
    """What one could have, by its points, ascending: shares of a pool, or options of each issue."""
    by_points: dict[float, list] = {}
    own = Private(values, wants, 0, "", "")
    for choice in product(*(range(count + 1) for count in counts or (2,) * len(values))):
        points = utility(own, 0, choice if wants else (choice,))
        by_points.setdefault(points, []).append(choice)
    return tuple((points, tuple(by_points[points])) for points in sorted(by_points))


class ScriptedPlayer:
    """A `Player` for one agent. Of `scenario` it keeps what everybody knows and what is its own.

    Each turn has its own random numbers, drawn from `seed`, the seat and the turn's index. The
    state is what was heard; going back to one plays it again.
    """

    def __init__(self, temperament: str, scenario: Scenario, agent: str, seed: int):
        if temperament not in TEMPERAMENTS:
            names = ", ".join(TEMPERAMENTS)
            raise Refused(f"temperament is {temperament!r}; expected one of {names}")
        if agent not in scenario.setting.agents:
            names = ", ".join(scenario.setting.agents)
            raise Refused(f"agent is {agent!r}; expected one of {names}")
        self.temper = TEMPERAMENTS[temperament]
        self.setting: Setting = scenario.setting
        self.seat = scenario.setting.agents.index(agent)
        self.own: Private = scenario.private[self.seat]
        self.seed = seed
        # The episode as it sees it at a turn of each seat: only whose turn it is matters there.
        players = len(scenario.setting.agents)
        self._at_turn_of = [
            Scenario(scenario.setting, (self.own,) * players, 1, seat) for seat in range(players)
        ]
        self._rng = random.Random(0)
        self._forget()

    def _forget(self) -> None:
        players, topics = len(self.setting.agents), len(self.setting.topics)
        self.heard: list[list[tuple[str, str]]] = []  # for each turn what was new: (name, text)
        self.standing: Offer | None = None  # the offer on the table
        self.proposer: int | None = None  # whose it is
        self.demand = float(POINTS)  # what its own last offer was worth to it
        self.first_given: float | None = None  # what the others' first and best offers were worth
        self.best_given = 0.0
        self.asked = False  # somebody asked about its wishes and got no answer yet
        self.said: set[str] = set()
        # How much each seat seems to care about each topic, and in terms which option it wants.
        self.cares = [[1.0] * topics for _ in range(players)]
        self.wishes = [[1] * topics for _ in range(players)]

    def state_dict(self) -> dict:
        return {"seed": self.seed, "heard": [[list(said) for said in turn] for turn in self.heard]}

    def load_state_dict(self, state: dict) -> None:
        self.seed = state["seed"]
        self._forget()
        for turn in state["heard"]:
            self.act([Message("user", text, name) for name, text in turn])

    def act(self, messages: Sequence[Message]) -> str:
        news = [(m.name, m.content) for m in messages if m.role == "user"]
        rng = self._rng
        rng.seed((self.seed * 8 + self.seat) * 1024 + len(self.heard))
        for name, text in news:
            self._listen(self.setting.agents.index(name), text)
        aim = self._aim(rng)
        self.heard.append(news)
        return self._speak(aim, rng)

    def _listen(self, seat: int, text: str) -> None:
        # What the rules refuse does nothing, whatever it sounds like.
        table = Table(self._at_turn_of[seat], standing=self.standing, proposer=self.proposer)
        turn = table.speak(text)
        if not turn.valid:
            return
        self.standing, self.proposer = table.standing, table.proposer
        for kind, detail in turn.acts:
            if kind == "propose":
                given = utility(self.own, self.seat, detail)
                if self.first_given is None:
                    self.first_given = given
                self.best_given = max(self.best_given, given)
                if self.setting.counts:
                    for topic, count in enumerate(self.setting.counts):
                        self.cares[seat][topic] += detail[seat][topic] / count
                else:
                    self.wishes[seat] = list(detail)
            elif kind == "ask":
                self.asked = True
            elif kind == "most":
                self.cares[seat][self.setting.topics.index(detail)] += 2.0
            elif kind == "least":
                self.cares[seat][self.setting.topics.index(detail)] *= 0.2

    def _aim(self, rng: random.Random) -> float:
        """The points it wants at this turn, never below its limit."""
        temper, limit = self.temper, self.own.limit
        # A pool shared among more agents holds less for each one.
        crowd = 2 / len(self.setting.agents) if self.setting.counts else 1.0
        way = max(POINTS * crowd - limit, 1.0)
        if temper.mirror:
            gave = self.best_given - self.first_given if self.first_given is not None else 0.0
            patience = 0.06 * len(self.heard)
            share = max(temper.end, temper.start - patience - temper.mirror * gave / way)
        else:
            passed = min(1.0, len(self.heard) / _HORIZON) ** temper.shape
            share = temper.start + (temper.end - temper.start) * passed
        aim = limit + way * (share + rng.gauss(0.0, temper.noise))
        if rng.random() < 0.9:  # mostly it remembers what it asked for last
            aim = min(aim, self.demand)
        return max(aim, float(limit))

    def _speak(self, aim: float, rng: random.Random) -> str:
        temper, habit = self.temper, self.temper.habit
        chance = rng.random
        offered = None
        if self.standing is not None and self.proposer != self.seat:
            offered = utility(self.own, self.seat, self.standing)
        slack = 0.5 * (len(self.cares) - 1)  # the more must agree, the less one may insist
        before = []
        if self.asked and chance() < temper.answer:
            before.append(self._wish(rng))
            self.asked = False
        if offered is not None and offered >= self.own.limit and offered >= aim - slack:
            if chance() < temper.courtesy:
                before.append(say("courtesy", rng, habit))
            self.said.add("courtesy")
            return " ".join([*before[:1], say("accept", rng, habit)])
        if (
            offered is not None
            and offered < self.own.limit
            and len(self.heard) > temper.patience
            and chance() < temper.leave
        ):
            return say("leave", rng, habit)
        if not before:
            before = self._small_talk(offered, rng)
        offer = self._offer(aim, rng)
        self.demand = utility(self.own, self.seat, offer)
        self.standing, self.proposer = offer, self.seat
        yours = 0.35 if habit % 2 else 0.1
        spoken = say_offer(self.setting, self.seat, offer, rng, habit, yours)
        after = []
        if "ask" not in self.said and chance() < self._inclined("curious", temper.ask):
            after = [say("ask", rng, habit)]
            self.said.add("ask")
        return " ".join([*before, spoken, *after])

    def _small_talk(self, offered: float | None, rng: random.Random) -> list[str]:
        """At most one sentence before an offer."""
        temper, habit, chance = self.temper, self.temper.habit, rng.random
        if self.own.trait == "terse" and chance() < 0.8:
            return []
        if chance() < temper.slip:
            bluff = chance() < temper.lie
            number = min(POINTS, self.own.limit + 2) if bluff else self.own.limit
            return [say_about("limit", self.setting, number, rng, habit)]
        if offered is not None and chance() < self._inclined("calm", temper.rude):
            return [say("rude", rng, habit)]
        if "wish" not in self.said and chance() < self._inclined("frank", temper.tell):
            return [self._wish(rng)]
        if "courtesy" not in self.said and chance() < self._inclined("polite", temper.courtesy):
            self.said.add("courtesy")
            return [say("courtesy", rng, habit)]
        if offered is not None and chance() < temper.refuse:
            return [say("reject", rng, habit)]
        return []

    def _inclined(self, trait: str, chance: float) -> float:
        """A chance, as its trait bends it."""
        if self.own.trait != trait:
            return chance
        return 0.3 * chance if trait == "calm" else min(1.0, chance + 0.4)

    def _wish(self, rng: random.Random) -> str:
        """A word about what matters most or least to it, mostly true."""
        kind = "most" if rng.random() < 0.8 else "least"
        best = (max if kind == "most" else min)(self.own.values)
        lie = rng.random() < self.temper.lie
        fits = [
            topic
            for topic, value in zip(self.setting.topics, self.own.values, strict=True)
            if (value == best) != lie
        ]
        self.said.add("wish")
        topic = rng.choice(fits or self.setting.topics)
        return say_about(kind, self.setting, topic, rng, self.temper.habit)

    def _offer(self, aim: float, rng: random.Random) -> Offer:
        """What is worth at least about `aim` to it, little more, and looks best for the others."""
        own, counts = self.own, self.setting.counts
        choices = _choices(counts, own.values, own.wants)
        floor = max(aim - 0.25, own.limit)
        at = next((i for i, (points, _) in enumerate(choices) if points >= floor), len(choices) - 1)
        near = [choice for _, some in choices[at : at + 2] for choice in some]
        others = [seat for seat in range(len(self.cares)) if seat != self.seat]
        noise = rng.random

        if counts:
            books, hats, balls = (sum(self.cares[s][t] for s in others) for t in range(3))
            whole = books * counts[0] + hats * counts[1] + balls * counts[2]

            def pleases(share: tuple[int, int, int]) -> float:
                left = whole - books * share[0] - hats * share[1] - balls * share[2]
                return left * (0.85 + 0.3 * noise())

            return self._split(max(near, key=pleases), rng)

        def suits(options: tuple[int, ...]) -> float:
            apart = 0.0
            for seat in others:
                for care, wish, option in zip(
                    self.cares[seat], self.wishes[seat], options, strict=True
                ):
                    apart += care * abs(wish - option)
            return -apart * (0.85 + 0.3 * noise())

        return max(near, key=suits)

    def _split(self, share: tuple[int, ...], rng: random.Random) -> Offer:
        """Its own share and the rest, piece by piece to who seems to need it most."""
        counts, players = self.setting.counts, len(self.cares)
        left = [count - mine for count, mine in zip(counts, share, strict=True)]
        shares = [[0] * len(counts) for _ in range(players)]
        shares[self.seat] = list(share)
        others = [seat for seat in range(players) if seat != self.seat]
        if players == 2:
            shares[others[0]] = left
        else:
            got = [0.5] * players
            for topic in sorted(range(len(counts)), key=lambda _: rng.random()):
                for _ in range(left[topic]):
                    to = max(
                        others,
                        key=lambda s: self.cares[s][topic] / got[s] * (0.8 + 0.4 * rng.random()),
                    )
                    shares[to][topic] += 1
                    got[to] += self.cares[to][topic]
        return tuple(tuple(part) for part in shares)


def scripted_player(env: Bargaining, temperament: str, agent: str, seed: int) -> ScriptedPlayer:
    """A script for one agent of an environment that was reset."""
    return ScriptedPlayer(temperament, env.scenario, agent, seed)


def scripted_corpus(
    options: Options | Mapping[str, object],
    n: int,
    seed: int,
    temperaments: Sequence[str] = TRAINING,
) -> Iterator[Episode]:
    """`n` episodes among scripts, each seat with a temperament drawn from `temperaments`.

    Episode i is the environment's episode `seed + i`, its temperaments drawn from that too.
    """
    env = Bargaining(options if isinstance(options, Options) else Options(**options))
    for episode in range(seed, seed + n):
        rng = random.Random(episode + (1 << 40))

        def cast(env: Bargaining, rng: random.Random = rng) -> dict[str, ScriptedPlayer]:
            return {
                agent: scripted_player(env, rng.choice(temperaments), agent, rng.getrandbits(40))
                for agent in env.agents
            }

        yield play(env, cast, episode)
