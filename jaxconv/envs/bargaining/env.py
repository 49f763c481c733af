"""The bargaining world as an environment: two to five agents talk until they have a deal."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxconv.data.conversation import Message
from jaxconv.envs.bargaining.evaluator import judge, payoff
from jaxconv.envs.bargaining.language import brief, environment, how_to_talk, join, profile
from jaxconv.envs.bargaining.rules import Table
from jaxconv.envs.bargaining.scenario import KINDS, MAX_PLAYERS, Scenario, draw
from jaxconv.envs.base import Step, check_actions
from jaxconv.envs.dimensions import complete_weights, normalised, overall
from jaxconv.envs.profiles import AgentProfile, EnvironmentProfile
from jaxconv.errors import Refused


@dataclass(frozen=True)
class Options:
    """What may be set. Refused names the option, its value and what it may be.

    Attributes:
      players: how many agents there may be (2 to 5), one of these is drawn for an episode.
      kinds: "division", "terms" or both, drawn likewise.
      turns: fewest and most turns of an agent; the end is drawn between them and told to nobody.
      weights: of the seven dimensions in the reward; 1 where not given.
      rules: whether the brief explains the game, for models that have not seen it played.
    """

    players: tuple[int, ...] = (2,)
    kinds: tuple[str, ...] = ("division",)
    turns: tuple[int, int] = (3, 5)
    weights: Mapping[str, float] = field(default_factory=dict)
    rules: bool = False

    def __post_init__(self):
        for name in ("players", "kinds", "turns"):  # a configuration file gives lists
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not value:
                raise Refused(f"{name} is {value!r}; expected a tuple that is not empty")
            object.__setattr__(self, name, tuple(value))
        for count in self.players:
            if type(count) is not int or not 2 <= count <= MAX_PLAYERS:
                raise Refused(f"players is {self.players}; each must be 2 to {MAX_PLAYERS}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise Refused(f"kinds is {self.kinds}; each must be one of {', '.join(KINDS)}")
        whole = all(type(turns) is int for turns in self.turns)
        if not whole or len(self.turns) != 2 or not 1 <= self.turns[0] <= self.turns[1]:
            raise Refused(f"turns is {self.turns}; expected (fewest, most), ascending from 1")
        if not isinstance(self.rules, bool):
            raise Refused(f"rules is {self.rules!r}; expected True or False")
        object.__setattr__(self, "weights", complete_weights(dict(self.weights)))


class Bargaining:
    """An `Env`. One agent speaks at a time, in turn, beginning with one drawn by the seed.

    The default action, which an utterance that is not understood becomes, is to do nothing: the
    offer on the table stays and the turn is used up. Others hear the words as they were said, with
    control characters as spaces and cut to 240 characters.

    Rewards are 0 until the end; then each agent earns its dimensions' weighted mean, mapped to
    [0, 1]. The last `infos` hold for each agent `dimensions`, `overall` (their plain mean),
    `payoff` (points, None without a deal), `deal`, `end` ("deal", "left", "limit") and `seat`.
    """

    def __init__(self, options: Options | None = None):
        self.options = options or Options()
        self.agents: tuple[str, ...] = ()
        self.teams: dict[str, str] = {}
        self._seed: int | None = None
        self._table: Table | None = None

    @property
    def scenario(self) -> Scenario:
        """What the current episode is about, secrets included."""
        return self._started().scenario

    def reset(self, seed: int) -> Step:
        """Starts the episode that belongs to `seed`; each agent is told its brief."""
        self._begin(seed)
        scenario, rules = self.scenario, self.options.rules
        return Step(
            to_act=(self.agents[self._table.seat],),
            observations={
                agent: [Message("system", brief(scenario, seat, rules=rules))]
                for seat, agent in enumerate(self.agents)
            },
            rewards=dict.fromkeys(self.agents, 0.0),
            terminated=False,
            truncated=False,
            infos={agent: {"seat": seat} for seat, agent in enumerate(self.agents)},
        )

    def step(self, actions: Mapping[str, str]) -> Step:
        """Takes the words of the agent whose turn it is."""
        table = self._started()
        over = table.end is not None
        speaker = self.agents[table.seat]
        check_actions(actions, () if over else (speaker,))
        turn = table.speak(actions[speaker])
        heard = Message("user", turn.text, speaker)
        infos: dict[str, dict] = {speaker: {"valid": turn.valid, "reason": turn.reason}}
        rewards = dict.fromkeys(self.agents, 0.0)
        if table.end is not None:
            self._score(infos, rewards)
        return Step(
            to_act=() if table.end is not None else (self.agents[table.seat],),
            observations={agent: [heard] for agent in self.agents if agent != speaker},
            rewards=rewards,
            terminated=table.end is not None,
            truncated=False,
            infos=infos,
        )

    def state_dict(self) -> dict:
        """Seed and utterances: nothing is drawn after `reset`, so these are the whole state."""
        if self._table is None:
            return {"seed": None, "said": []}
        return {"seed": self._seed, "said": [turn.text for turn in self._table.turns]}

    def load_state_dict(self, state: dict) -> None:
        """Goes back to a state of an environment with the same options."""
        if state["seed"] is None:
            self.agents, self.teams, self._seed, self._table = (), {}, None, None
            return
        self._begin(state["seed"])
        for text in state["said"]:
            self._table.speak(text)

    def _begin(self, seed: int) -> None:
        if type(seed) is not int:
            raise TypeError(f"seed is {seed!r}; expected an int")
        options = self.options
        self._seed = seed
        self._table = Table(draw(seed, options.players, options.kinds, options.turns))
        self.agents = self.scenario.setting.agents
        self.teams = dict.fromkeys(self.agents, "all")

    def _started(self) -> Table:
        if self._table is None:
            raise ValueError("no episode yet; call reset(seed) first")
        return self._table

    def _score(self, infos: dict[str, dict], rewards: dict[str, float]) -> None:
        table = self._table
        scores, payoffs = judge(table), payoff(table)
        for seat, agent in enumerate(self.agents):
            dimensions = scores[agent]
            rewards[agent] = normalised(dimensions, self.options.weights)
            infos[agent] = {
                **infos.get(agent, {}),
                "seat": seat,
                "dimensions": dimensions,
                "overall": overall(dimensions),
                "payoff": payoffs[seat] if payoffs else None,
                "deal": bool(payoffs),
                "end": table.end,
            }


def profiles(env: Bargaining) -> tuple[EnvironmentProfile, tuple[AgentProfile, ...]]:
    """The episode's situation and its characters in seat order, secrets included."""
    scenario = env.scenario
    return environment(scenario), tuple(profile(scenario, k) for k in range(len(env.agents)))


def rules(env: Bargaining, agent: str) -> str:
    """How the game goes and what is understood, as `Options.rules` adds it to a brief."""
    others = join([name for name in env.agents if name != agent])
    return how_to_talk(env.scenario.setting, others)
