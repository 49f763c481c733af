"""A long conversation in few words: two agents hand each other questions, a dozen turns each.

Whoever speaks must turn the last pair of letters into another, letter by letter, with the code that
its brief names; that answer is the partner's next question. An answer may be right or wrong, and a
turn earns a point when it is right *and* the turn before it was right too. The score of both
agents is the share of such turns, paid once, at the very end: many turns share one number, and
every turn matters for the one after it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random

from jaxconv.data.conversation import Message
from jaxconv.envs.base import Step, check_actions
from jaxconv.envs.episode import Episode, play

LETTERS = "abcdefgh"
CODES = ("one", "two", "three", "four")
PAY = 10.0  # for a perfect score; outcomes then spread by about 1, as critics like it


def _tables() -> dict[str, dict[str, str]]:
    """One permutation of the letters a code, the same in every run."""
    rng = Random(0)
    return {
        code: dict(zip(LETTERS, rng.sample(LETTERS, len(LETTERS)), strict=True)) for code in CODES
    }


TABLES = _tables()


def answer(code: str, question: Sequence[str]) -> tuple[str, ...]:
    """The right answer to a pair of letters."""
    return tuple(TABLES[code][letter] for letter in question)


class Relay:
    """The world as an `Env`; `turns` is how many turns each agent has.

    A turn that is not two known letters is wrong and invalid, and its question is asked again.
    Every message to an agent is a scoreboard, the points so far and the turns left, and then the
    question: who reads it can tell what the turns before were worth.
    """

    agents = ("ann", "bob")
    teams: Mapping[str, str] = dict.fromkeys(agents, "relay")

    def __init__(self, turns: int):
        self._turns = turns

    def reset(self, seed: int) -> Step:
        rng = Random(seed)
        self._code = rng.choice(CODES)
        self._question = tuple(rng.choices(LETTERS, k=2))
        self._first = rng.randrange(2)
        self._right: list[bool] = []
        heard = {agent: [Message("system", self._code)] for agent in self.agents}
        heard[self._speaker()].append(self._news())
        return Step((self._speaker(),), heard, {}, False, False, {})

    def step(self, actions: Mapping[str, str]) -> Step:
        speaker = self._speaker()
        check_actions(actions, (speaker,))
        said = tuple(actions[speaker].split())
        valid = len(said) == len(self._question) and set(said) <= set(LETTERS)
        self._right.append(said == answer(self._code, self._question))
        if valid:
            self._question = said
        infos = {speaker: {"valid": valid}}
        if len(self._right) == 2 * self._turns:
            measured = {"score": self.score(), "right": self.share_right()}
            infos = {agent: infos.get(agent, {}) | measured for agent in self.agents}
            rewards = dict.fromkeys(self.agents, PAY * self.score())
            return Step((), {}, rewards, True, False, infos)
        heard = {self._speaker(): [self._news()]}
        return Step((self._speaker(),), heard, {}, False, False, infos)

    def _news(self) -> Message:
        left = 2 * self._turns - len(self._right)
        return Message("user", f"{self.points()} {left} {' '.join(self._question)}")

    def _speaker(self) -> str:
        return self.agents[(self._first + len(self._right)) % 2]

    def points(self) -> int:
        """Turns that were right after a right one; the first needs none before it."""
        before = [True, *self._right[:-1]]
        return sum(a and b for a, b in zip(before, self._right, strict=False))

    def score(self) -> float:
        return self.points() / (2 * self._turns)

    def share_right(self) -> float:
        return sum(self._right) / (2 * self._turns)

    def state_dict(self) -> dict:
        return {
            "code": self._code,
            "question": list(self._question),
            "first": self._first,
            "right": list(self._right),
        }

    def load_state_dict(self, state: dict) -> None:
        self._code, self._question = state["code"], tuple(state["question"])
        self._first, self._right = state["first"], list(state["right"])


@dataclasses.dataclass
class NoisyScript:
    """Knows each letter's answer with probability `skill` and says any letter otherwise."""

    skill: float
    rng: Random
    code: str = ""

    def act(self, messages: Sequence[Message]) -> str:
        for message in messages:
            if message.role == "system":
                self.code = message.content
        right = answer(self.code, messages[-1].content.split()[-2:])
        return " ".join(
            letter if self.rng.random() < self.skill else self.rng.choice(LETTERS)
            for letter in right
        )


def scripted_episode(turns: int, skill: float, seed: int) -> Episode:
    """One conversation of two noisy scripts."""
    return play(
        Relay(turns),
        lambda env: {
            agent: NoisyScript(skill, Random(2 * seed + seat))
            for seat, agent in enumerate(env.agents)
        },
        seed,
    )
