"""Small environments and players for tests of self-play."""

from jaxconv.data.conversation import Message
from jaxconv.envs.base import Step, check_actions


class Talk:
    """`agents` talk for `rounds` rounds, one after the other or all at once.

    Every word said earns its agent 1; at the end each agent earns 100 more. Turns that are empty
    are invalid.
    """

    def __init__(self, agents: int = 2, rounds: int = 3, *, together: bool = False):
        self.agents = tuple(f"agent{i}" for i in range(agents))
        self.teams = dict.fromkeys(self.agents, "all")
        self._rounds, self._together = rounds, together

    def reset(self, seed: int) -> Step:
        self._seed, self._said = seed, 0
        return Step(
            to_act=self._to_act(),
            observations={
                agent: [Message("system", f"talk {seed} as {agent}")] for agent in self.agents
            },
            rewards={},
            terminated=False,
            truncated=False,
            infos={},
        )

    def step(self, actions) -> Step:
        acting = self._to_act()
        check_actions(actions, acting)
        self._said += len(actions)
        over = not self._to_act()
        return Step(
            to_act=self._to_act(),
            observations={
                agent: [Message("user", actions[s], s) for s in acting if s != agent]
                for agent in self.agents
            },
            rewards={
                agent: len(actions.get(agent, "").split()) + 100.0 * over for agent in self.agents
            },
            terminated=over,
            truncated=False,
            infos={agent: {"valid": bool(actions[agent].strip())} for agent in acting},
        )

    def _to_act(self) -> tuple[str, ...]:
        n = len(self.agents)
        if self._said >= n * self._rounds:
            return ()
        return self.agents if self._together else (self.agents[(self._seed + self._said) % n],)

    def state_dict(self) -> dict:
        return {"seed": self._seed, "said": self._said}

    def load_state_dict(self, state: dict) -> None:
        self._seed, self._said = state["seed"], state["said"]


class Counter:
    """Says how many messages it has heard so far."""

    def __init__(self, name: str):
        self._name, self._heard = name, 0

    def act(self, messages) -> str:
        self._heard += len(messages)
        return f"{self._name} {self._heard}"

    def state_dict(self) -> dict:
        return {"heard": self._heard}

    def load_state_dict(self, state: dict) -> None:
        self._heard = state["heard"]


def make_counter(name, env, agent, seed) -> Counter:
    return Counter(name)
