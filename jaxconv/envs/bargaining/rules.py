"""The rules: whose turn it is, what an utterance does, when it is over. No randomness."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxconv.envs.bargaining.language import Act
from jaxconv.envs.bargaining.parser import clean, understand
from jaxconv.envs.bargaining.scenario import Offer, Scenario


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance and the table before it.

    `reason` is None when it was valid, else why it did nothing; `acts` are what was understood all
    the same. `standing` is the offer on the table just before, made from seat `proposer`.
    """

    seat: int
    text: str
    key: str
    acts: tuple[Act, ...]
    reason: str | None
    standing: Offer | None
    proposer: int | None

    @property
    def valid(self) -> bool:
        return self.reason is None


@dataclass(slots=True)
class Table:
    """A game under way.

    An invalid utterance does nothing: the offer on the table stays, the turn is used up. An offer
    replaces the one before it. A deal is made when everyone but its proposer has accepted the offer
    on the table. A rejection takes one's own acceptance back and leaves the offer there. Whoever
    leaves ends the talk for all, without a deal.
    """

    scenario: Scenario
    turns: list[Turn] = field(default_factory=list)
    standing: Offer | None = None
    proposer: int | None = None
    accepted: set[int] = field(default_factory=set)
    end: str | None = None  # "deal", "left" or "limit"

    @property
    def seat(self) -> int:
        """Who speaks next."""
        return (self.scenario.first + len(self.turns)) % len(self.scenario.private)

    @property
    def deal(self) -> Offer | None:
        return self.standing if self.end == "deal" else None

    def speak(self, text: str) -> Turn:
        """Takes the words of the one whose turn it is.

        Beyond those of `parser.understand`, reasons for being invalid are "no offer" (nothing on
        the table to accept or reject) and "own offer".
        """
        seat = self.seat
        text = clean(text)
        heard = understand(self.scenario.setting, seat, text)
        reason = heard.reason
        if reason is None:
            for act in heard.acts:
                if act.kind in ("accept", "reject"):
                    if self.standing is None:
                        reason = "no offer"
                    elif self.proposer == seat:
                        reason = "own offer"
        turn = Turn(seat, text, heard.key, heard.acts, reason, self.standing, self.proposer)
        self.turns.append(turn)
        if reason is None:
            for act in heard.acts:
                self._apply(seat, act)
        if self.end is None and len(self.turns) >= self.scenario.utterances:
            self.end = "limit"
        return turn

    def _apply(self, seat: int, act: Act) -> None:
        if act.kind == "propose":
            self.standing, self.proposer = act.detail, seat
            self.accepted.clear()
        elif act.kind == "accept":
            self.accepted.add(seat)
            if len(self.accepted) == len(self.scenario.private) - 1:
                self.end = "deal"
        elif act.kind == "reject":
            self.accepted.discard(seat)
        elif act.kind == "leave":
            self.end = "left"


def replay(scenario: Scenario, transcript: Iterable[str]) -> Table:
    """The table after the utterances of a transcript, in order."""
    table = Table(scenario)
    for text in transcript:
        if table.end is not None:
            raise ValueError(f"the talk ended ({table.end}) before {text!r} was said")
        table.speak(text)
    return table
