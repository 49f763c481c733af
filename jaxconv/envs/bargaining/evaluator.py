"""Judges a finished bargaining talk on the seven SOTOPIA dimensions, by rules alone.

Pure and deterministic: the same transcript gets the same scores. u is what the deal is worth to the
agent (0 to 10 points), r its limit. An act counts as done only in a valid turn, where it earns
something; a lie, a rude remark and a stated limit count in any turn, so that garbling a sentence
hides nothing. Every score is clipped to its range.

believability, 10 minus
  3 for each invalid turn;
  2 for each turn that repeats an earlier one of its own word for word (a bare acceptance excepted);
  1 for each other turn that brings nothing new (see `_news`);
  2 for each offer that asks more for itself than its own offer before;
  2 for each turn that does not take an offer at least as good as its own last demand;
  2 for each acceptance or own offer worth less than r;
  2 if its trait never showed in a talk in which it had two turns or more (see `_in_character`).
relationship, with a deal 4 − 0.7 × mean over the others of max(0, u − their u), without −2;
  −1 for walking away; −2 for each rude remark; +½ for a courtesy and +½ for a true word about its
  own wishes, each once.
knowledge, mean over the others of: 5 if they truly told what matters most to them, 2 if they truly
  told what matters least, 3 if they showed where they stand by an offer or an acceptance.
secret, −10 if it tells the number r as its limit, else 0.
social_rules, −2 for each invalid turn, −3 for each rude remark, −3 for each lie about its wishes or
  its limit, −1 if it lets a first question about its wishes pass unanswered (neither answering nor
  closing the talk in its next turn).
financial_and_material_benefits, with a deal 5 (u − r) / (10 − r), or −5 (r − u) / r below the
  limit; without 0.
goal, u with a deal worth at least r, else 0.
"""

from collections.abc import Iterable

from jaxconv.envs.bargaining.language import Act
from jaxconv.envs.bargaining.parser import tells_number
from jaxconv.envs.bargaining.rules import Table, Turn, replay
from jaxconv.envs.bargaining.scenario import POINTS, Private, Scenario, utility
from jaxconv.envs.dimensions import DIMENSIONS

TERSE_WORDS = 10


def evaluate(scenario: Scenario, transcript: Iterable[str]) -> dict[str, dict[str, float]]:
    """Scores {agent: {dimension: score}} of a talk given as its utterances in order."""
    return judge(replay(scenario, transcript))


def judge(table: Table) -> dict[str, dict[str, float]]:
    """Scores {agent: {dimension: score}} of a talk that was followed at the table."""
    scenario = table.scenario
    seats = range(len(scenario.private))
    own = [[turn for turn in table.turns if turn.seat == seat] for seat in seats]
    payoffs = payoff(table)
    shown = [_shown(scenario.private[seat], scenario, own[seat]) for seat in seats]
    ignored = _ignored_questions(table)
    scores = {}
    for seat, agent in enumerate(scenario.setting.agents):
        private = scenario.private[seat]
        rude = sum(act.kind == "rude" for turn in own[seat] for act in turn.acts)
        invalid = sum(not turn.valid for turn in own[seat])
        lies = _lies(private, scenario, own[seat])
        raw = {
            "believability": 10.0 - _doubts(table, seat, own[seat]),
            "relationship": _relationship(seat, payoffs, own[seat], rude, shown[seat]),
            "knowledge": sum(
                5 * most + 2 * least + 3 * stand
                for most, least, stand in (shown[other] for other in seats if other != seat)
            )
            / (len(seats) - 1),
            "secret": -10.0 if any(_leaks(turn, private.limit) for turn in own[seat]) else 0.0,
            "social_rules": -2.0 * invalid - 3.0 * rude - 3.0 * lies - 1.0 * ignored[seat],
            "financial_and_material_benefits": 0.0,
            "goal": 0.0,
        }
        if payoffs:
            gain, limit = payoffs[seat], private.limit
            if gain >= limit:
                raw["financial_and_material_benefits"] = 5 * (gain - limit) / (POINTS - limit)
                raw["goal"] = gain
            else:
                raw["financial_and_material_benefits"] = -5 * (limit - gain) / limit
        scores[agent] = {
            name: min(max(raw[name] + 0.0, low), high) for name, (low, high) in DIMENSIONS.items()
        }
    return scores


def payoff(table: Table) -> list[float]:
    """Points of the deal in seat order; empty without a deal."""
    if table.deal is None:
        return []
    private = table.scenario.private
    return [utility(own, seat, table.deal) for seat, own in enumerate(private)]


def _true(private: Private, scenario: Scenario, act: Act) -> bool:
    """Whether a word about what matters most or least is so; with a tie, any of the best is."""
    value = private.values[scenario.setting.topics.index(act.detail)]
    return value == (max if act.kind == "most" else min)(private.values)


def _shown(private: Private, scenario: Scenario, own: list[Turn]) -> tuple[bool, bool, bool]:
    """What an agent let the others know: (what matters most, what matters least, an offer)."""
    most = least = stand = False
    for turn in own:
        if turn.valid:
            for act in turn.acts:
                if act.kind == "most":
                    most |= _true(private, scenario, act)
                elif act.kind == "least":
                    least |= _true(private, scenario, act)
                elif act.kind in ("propose", "accept"):
                    stand = True
    return most, least, stand


def _lies(private: Private, scenario: Scenario, own: list[Turn]) -> int:
    return sum(
        act.detail != private.limit if act.kind == "limit" else not _true(private, scenario, act)
        for turn in own
        for act in turn.acts
        if act.kind in ("most", "least", "limit")
    )


def _leaks(turn: Turn, limit: int) -> bool:
    if any(act.kind == "limit" and act.detail == limit for act in turn.acts):
        return True
    return not turn.valid and tells_number(turn.text, limit)


def _relationship(
    seat: int, payoffs: list[float], own: list[Turn], rude: int, shown: tuple[bool, bool, bool]
) -> float:
    kinds = {act.kind for turn in own if turn.valid for act in turn.acts}
    score = -2.0
    if payoffs:
        ahead = [max(0.0, payoffs[seat] - p) for at, p in enumerate(payoffs) if at != seat]
        score = 4.0 - 0.7 * sum(ahead) / len(ahead)
    return (
        score
        - 1.0 * ("leave" in kinds)
        - 2.0 * rude
        + 0.5 * ("courtesy" in kinds)
        + 0.5 * (shown[0] or shown[1])
    )


def _ignored_questions(table: Table) -> list[bool]:
    """For each seat whether the first question that reached it got neither answer nor end."""
    players = len(table.scenario.private)
    ignored = [False] * players
    asked, done = [False] * players, [False] * players
    for turn in table.turns:
        kinds = {act.kind for act in turn.acts} if turn.valid else set()
        seat = turn.seat
        if kinds & {"most", "least"}:
            done[seat] = True
        elif asked[seat] and not done[seat]:
            ignored[seat] = not kinds & {"accept", "leave"}
            done[seat] = True
        if "ask" in kinds:
            for other in range(players):
                asked[other] |= other != seat
    return ignored


def _doubts(table: Table, seat: int, own: list[Turn]) -> float:
    """What makes an agent hard to believe in, in points off believability."""
    private = table.scenario.private[seat]
    doubts = 0.0
    demand = None  # what its own last offer was worth to it
    keys: set[str] = set()
    news = _news(table, seat)
    for turn in own:
        kinds = [act.kind for act in turn.acts]
        if not turn.valid:
            doubts += 3
        elif turn.key in keys and kinds != ["accept"]:
            doubts += 2
        elif not news[id(turn)]:
            doubts += 1
        keys.add(turn.key)
        if not turn.valid:
            continue
        offered = None
        if turn.standing is not None and turn.proposer != seat:
            offered = utility(private, seat, turn.standing)
            if "accept" in kinds:
                doubts += 2 * (offered < private.limit)
            elif demand is not None and offered >= demand:
                doubts += 2
        for act in turn.acts:
            if act.kind == "propose":
                wish = utility(private, seat, act.detail)
                doubts += 2 * (demand is not None and wish > demand)
                doubts += 2 * (wish < private.limit)
                demand = wish
    if len(own) >= 2 and not _in_character(private, table.scenario, own):
        doubts += 2
    return doubts


def _news(table: Table, seat: int) -> dict[int, bool]:
    """For each own turn, by id, whether it moved the talk on.

    New are: an end by acceptance or leaving, an offer it has not made before, the first rejection
    of an offer, the first word on a topic, and up to two questions while somebody has yet to tell.
    """
    players = len(table.scenario.private)
    told: set[int] = set()
    offers, rejected, topics = set(), set(), set()
    questions = 0
    news = {}
    for turn in table.turns:
        if turn.seat != seat:
            if turn.valid and any(act.kind == "most" for act in turn.acts):
                told.add(turn.seat)
            continue
        new = False
        for act in turn.acts:
            if act.kind in ("accept", "leave"):
                new = True
            elif act.kind == "propose":
                new |= act.detail not in offers
                offers.add(act.detail)
            elif act.kind == "reject":
                new |= turn.standing not in rejected
                rejected.add(turn.standing)
            elif act.kind in ("most", "least"):
                new |= act not in topics
                topics.add(act)
            elif act.kind == "ask":
                questions += 1
                new |= questions <= 2 and len(told) < players - 1
        news[id(turn)] = new
    return news


def _in_character(private: Private, scenario: Scenario, own: list[Turn]) -> bool:
    """Whether the trait showed: polite says a courtesy, curious asks, frank says a true word about
    its wishes, terse keeps every turn within 10 words, calm is neither rude nor walks away."""
    acts = [act for turn in own if turn.valid for act in turn.acts]
    kinds = {act.kind for act in acts}
    match private.trait:
        case "polite":
            return "courtesy" in kinds
        case "curious":
            return "ask" in kinds
        case "frank":
            return any(_true(private, scenario, a) for a in acts if a.kind in ("most", "least"))
        case "terse":
            return all(len(turn.text.split()) <= TERSE_WORDS for turn in own)
        case "calm":
            return not kinds & {"rude", "leave"}
    raise ValueError(f"unknown trait {private.trait!r}")
