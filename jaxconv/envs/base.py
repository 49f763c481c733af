"""What an environment is: who may speak, what each one sees, what it earned.

Environments see and return text, never token ids, and know no JAX. Everything random in an
environment comes from the seed of `reset`, so that two environments never disturb each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxconv.data.conversation import Message


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment tells after `reset` and after every `step`.

    Attributes:
      to_act: who must speak now; several may; () when the episode is over.
      observations: for each agent the messages that are new to it since the last `Step`. An agent's
        own words are not among them. An agent without news may be missing.
      rewards: what each agent earned; it belongs to that agent's latest turn.
      terminated: the outcome is final; a turn limit that belongs to the rules is such an outcome.
      truncated: the episode was cut from outside and its outcome is unknown.
      infos: per agent, for logs and reports only: `valid` (was its last action understood), a
        `reason` when it was not, and at the end what the environment measures. Not for agents.
    """

    to_act: tuple[str, ...]
    observations: Mapping[str, list[Message]]
    rewards: Mapping[str, float]
    terminated: bool
    truncated: bool
    infos: Mapping[str, dict]


class Env(Protocol):
    """A conversation among `agents`, driven from outside by `reset` and `step`.

    `agents` are the names of the current episode in seat order (they may differ between episodes);
    `teams` maps each agent to the group whose rewards may be compared.
    """

    agents: tuple[str, ...]
    teams: Mapping[str, str]

    def reset(self, seed: int) -> Step:
        """Starts the episode that belongs to `seed`."""
        ...

    def step(self, actions: Mapping[str, str]) -> Step:
        """Takes the words of exactly those who were in the last `Step.to_act`."""
        ...

    def state_dict(self) -> dict:
        """The whole state as JSON-able values."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Goes back to a state; what follows is as if nothing had happened in between."""
        ...


class Player(Protocol):
    """Somebody who speaks for one agent: a script, a person, a model elsewhere."""

    def act(self, messages: Sequence[Message]) -> str:
        """The next words of this agent, given only the messages new since its last turn."""
        ...

    def state_dict(self) -> dict:
        """The whole state as JSON-able values."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Goes back to a state."""
        ...


def check_actions(actions: Mapping[str, str], to_act: Sequence[str]) -> None:
    """Raises ValueError unless exactly the agents in `to_act` speak, TypeError unless in text."""
    if not to_act:
        raise ValueError("step() after the end of the episode; call reset(seed) first")
    if actions.keys() != set(to_act):
        raise ValueError(f"actions are for {sorted(actions)}; expected exactly {sorted(to_act)}")
    for agent, text in actions.items():
        if not isinstance(text, str):
            raise TypeError(f"the action of {agent} is {type(text).__name__}; expected str")
