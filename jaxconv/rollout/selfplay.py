"""Conversations on engines: many games at once, each seat played by a model or by a script.

The host keeps one burst in flight on each device: while it is decoded, the host reads one before
it, steps the environments and queues what each agent has heard. A policy may own several engines
("lanes"). The agents of a game sit in different lanes, so that a lane decodes while the others
listen and its slots are not held idle by agents whose turn it is not.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxconv.data.conversation import Message
from jaxconv.data.template import ChatTemplate
from jaxconv.envs.base import Env, Player, Step
from jaxconv.errors import Refused
from jaxconv.rollout.engine import Engine, Turn
from jaxconv.rollout.stream import Stream

MAX_AGENTS = 16
"""Most agents of one game: stream ids are game id × MAX_AGENTS + seat."""


@dataclasses.dataclass(frozen=True)
class Game:
    """One conversation to be played.

    Attributes:
        id: unique in the run, below 2**28.
        seed: what the environment is reset with.
        cast: who plays seat 0, 1, …: the name of a policy, or of a script; the last one plays all
            further seats.
    """

    id: int
    seed: int
    cast: tuple[str, ...]

    def player(self, seat: int) -> str:
        return self.cast[min(seat, len(self.cast) - 1)]


@dataclasses.dataclass
class Played:
    """A finished conversation.

    Attributes:
        game: what was asked for.
        agents: names in seat order.
        teams: team of each seat.
        streams: of each seat; empty where a script played.
        turn_rewards: reward of each own turn, by seat.
        texts: words of each own turn, by seat.
        valid: whether each own turn was understood, by seat.
        rewards: sum of each seat's rewards, turns or not.
        infos: what the environment measured for each seat at the end.
        transcript: (seat, words) in the order spoken.
        brief: the system message of each seat.
        truncated: cut from outside with the outcome unknown (a stream reached its cache's end).
    """

    game: Game
    agents: tuple[str, ...]
    teams: tuple[str, ...]
    streams: list[Stream]
    turn_rewards: list[list[float]]
    texts: list[list[str]]
    valid: list[list[bool]]
    rewards: list[float]
    infos: list[dict]
    transcript: list[tuple[int, str]]
    brief: list[str]
    truncated: bool = False


@dataclasses.dataclass
class _Live:
    """A game under way."""

    env: Env
    played: Played
    lanes: dict[int, tuple[int, int]]  # seat -> (engine index, slot); scripts have none
    scripts: dict[int, Player]
    heard: list[list[Message]]  # by seat, not yet told to it
    cut: list[bool]  # by seat: its last turn ended without the end token
    to_act: tuple[int, ...] = ()
    actions: dict[int, str] = dataclasses.field(default_factory=dict)  # by seat

    def said(self) -> list[tuple[int, str]]:
        """This round's words so far in the order of seats asked, whoever was quickest."""
        return [(seat, self.actions[seat]) for seat in self.to_act if seat in self.actions]

    def state_dict(self) -> dict:
        return {
            "env": self.env.state_dict(),
            "played": dataclasses.asdict(self.played),
            "lanes": self.lanes,
            "scripts": {seat: script.state_dict() for seat, script in self.scripts.items()},
            "heard": [[dataclasses.asdict(m) for m in heard] for heard in self.heard],
            "cut": self.cut,
            "to_act": self.to_act,
            "actions": self.actions,
        }


def _game(state: dict) -> Game:
    return Game(state["id"], state["seed"], tuple(state["cast"]))


def as_played(state: dict) -> Played:
    """The conversation that a snapshot holds."""
    return Played(
        **{
            **state,
            "game": _game(state["game"]),
            "agents": tuple(state["agents"]),
            "teams": tuple(state["teams"]),
            "streams": [Stream(**stream) for stream in state["streams"]],
            "transcript": [tuple(line) for line in state["transcript"]],
        }
    )


class SelfPlay:
    """Plays games to their end.

    Args:
        make_env: a new environment.
        make_script: (name, env, agent, seed) to a player, for casts that name no policy.
        template: how messages become tokens.
        policies: engines of each policy; their weights must be set before `play`.
        turn_budget: most tokens a turn may have.
        concurrent: games under way at once; limited by the engines' slots too.

    `play` and `advance` raise Refused for a game of more than `MAX_AGENTS` agents, and for one
    that needs more slots of one engine than there are.
    """

    def __init__(
        self,
        make_env: Callable[[], Env],
        make_script: Callable[[str, Env, str, int], Player],
        template: ChatTemplate,
        policies: Mapping[str, Sequence[Engine]],
        *,
        turn_budget: int,
        concurrent: int,
    ):
        self._make_env, self._make_script, self._template = make_env, make_script, template
        self._engines: list[Engine] = []
        self._lanes: dict[str, list[int]] = {}
        for name, engines in policies.items():
            self._lanes[name] = list(range(len(self._engines), len(self._engines) + len(engines)))
            self._engines += engines
        # One burst in flight for each device that engines are on.
        self._ahead = len({engine.device for engine in self._engines})
        self._turn_budget, self._concurrent = turn_budget, concurrent
        self._queue: collections.deque[Game] = collections.deque()
        self._live: dict[int, _Live] = {}
        self._owner: dict[tuple[int, int], tuple[int, int]] = {}  # (engine, slot) -> (game, seat)
        self._flying: collections.deque[int] = collections.deque()
        self._next = 0
        self.finished: list[Played] = []

    def play(self, games: Sequence[Game]) -> list[Played]:
        """Plays all games; results are in the order of `games`."""
        self.start(games)
        while self.advance():
            pass
        return self.results(games)

    def start(self, games: Sequence[Game]) -> None:
        """Queues games on freed engines."""
        for engine in self._engines:
            engine.reset()
        self._queue = collections.deque(games)
        self._live, self._owner = {}, {}
        self._flying.clear()
        self._next = 0
        self.finished = []

    def results(self, games: Sequence[Game]) -> list[Played]:
        """The finished games in the order of `games`."""
        by_id = {played.game.id: played for played in self.finished}
        return [by_id[game.id] for game in games]

    @functools.partial(jax.profiler.annotate_function, name="rollout")
    def advance(self) -> bool:
        """Starts at most one burst and reads at most one; False when every game is over."""
        self._admit()
        index = self._next
        self._next = (self._next + 1) % max(len(self._engines), 1)
        started = bool(self._engines) and self._engines[index].speaking
        if started:
            self._engines[index].dispatch()
            self._flying.append(index)
        if self._flying and (len(self._flying) > self._ahead or not started):
            index = self._flying.popleft()
            for turn in self._engines[index].collect():
                # A turn that ended in the same burst may have been the last of this one's game.
                if (index, turn.slot) in self._owner:
                    self._spoke(index, turn)
        return bool(self._queue or self._live or self._flying)

    def snapshot(self) -> tuple[list[dict], dict]:
        """Games under way, finished and waiting, and every engine: (arrays, JSON-able)."""
        engines = [engine.snapshot() for engine in self._engines]
        host = {
            "engines": [host for _, host in engines],
            "queue": [dataclasses.asdict(game) for game in self._queue],
            "live": [live.state_dict() for live in self._live.values()],
            "finished": [dataclasses.asdict(played) for played in self.finished],
            "flying": list(self._flying),
            "next": self._next,
        }
        return [arrays for arrays, _ in engines], host

    def like(self, host: dict) -> list[dict]:
        """Shapes of the arrays of a snapshot, given its JSON-able part."""
        return [e.like(h) for e, h in zip(self._engines, host["engines"], strict=True)]

    def restore(self, arrays: Sequence[dict], host: dict) -> None:
        """Goes back to a snapshot: what follows is what would have followed, bit for bit."""
        for engine, a, h in zip(self._engines, arrays, host["engines"], strict=True):
            engine.restore(a, h)
        self._queue = collections.deque(_game(game) for game in host["queue"])
        self.finished = [as_played(played) for played in host["finished"]]
        self._flying, self._next = collections.deque(host["flying"]), host["next"]
        self._live, self._owner = {}, {}
        for state in host["live"]:
            live = self._revive(state)
            game = live.played.game.id
            self._live[game] = live
            for seat, lane in live.lanes.items():
                self._owner[lane] = (game, seat)

    def _revive(self, state: dict) -> _Live:
        played = as_played(state["played"])
        env = self._make_env()
        env.reset(played.game.seed)
        scripts = {}
        for seat, script in state["scripts"].items():
            agent = played.agents[int(seat)]
            player = self._script(played.game, int(seat), env, agent)
            player.load_state_dict(script)
            scripts[int(seat)] = player
        env.load_state_dict(state["env"])
        return _Live(
            env=env,
            played=played,
            lanes={int(seat): tuple(lane) for seat, lane in state["lanes"].items()},
            scripts=scripts,
            heard=[[Message(**m) for m in heard] for heard in state["heard"]],
            cut=state["cut"],
            to_act=tuple(state["to_act"]),
            actions={int(seat): text for seat, text in state["actions"].items()},
        )

    def _script(self, game: Game, seat: int, env: Env, agent: str) -> Player:
        return self._make_script(game.player(seat), env, agent, game.seed * MAX_AGENTS + seat)

    def _admit(self) -> None:
        while self._queue and len(self._live) < self._concurrent:
            game = self._queue[0]
            env = self._make_env()
            step = env.reset(game.seed)
            if len(env.agents) > MAX_AGENTS:
                raise Refused(f"a game has {len(env.agents)} agents; it may have {MAX_AGENTS}")
            lanes = self._seat(game, env, step)
            if lanes is None:
                return
            self._queue.popleft()
            n = len(env.agents)
            scripts = {
                seat: self._script(game, seat, env, agent)
                for seat, agent in enumerate(env.agents)
                if seat not in lanes
            }
            played = Played(
                game=game,
                agents=env.agents,
                teams=tuple(env.teams[agent] for agent in env.agents),
                streams=[Stream() for _ in range(n)],
                turn_rewards=[[] for _ in range(n)],
                texts=[[] for _ in range(n)],
                valid=[[] for _ in range(n)],
                rewards=[0.0] * n,
                infos=[{}] * n,
                transcript=[],
                brief=[""] * n,
            )
            live = _Live(env, played, lanes, scripts, [[] for _ in range(n)], [False] * n)
            self._live[game.id] = live
            self._take(live, step)

    def _seat(self, game: Game, env: Env, step: Step) -> dict[int, tuple[int, int]] | None:
        """Opens a slot for every seat that a policy plays, or returns None while they do not fit.

        Lanes follow the speaking order, counted from whoever speaks first, so that agents who speak
        after each other decode in different lanes; every second game starts in other lanes.
        """
        n = len(env.agents)
        first = env.agents.index(step.to_act[0])
        wanted: dict[int, int] = {}
        for seat in range(n):
            lanes = self._lanes.get(game.player(seat))
            if lanes:
                wanted[seat] = lanes[(2 * game.id + (seat - first) % n) % len(lanes)]
        need = collections.Counter(wanted.values())
        for index, count in need.items():
            if count > self._engines[index].shape.slots:
                raise Refused(
                    f"a game of {n} agents needs {count} slots of one engine; "
                    f"rollout slots are {self._engines[index].shape.slots}"
                )
        if any(self._engines[index].free < count for index, count in need.items()):
            return None
        lanes = {}
        for seat, index in wanted.items():
            slot = self._engines[index].open(game.id * MAX_AGENTS + seat)
            lanes[seat] = (index, slot)
            self._owner[index, slot] = (game.id, seat)
        return lanes

    def _take(self, live: _Live, step: Step) -> None:
        """Books what a step brought and lets the next agents speak; scripts answer at once."""
        while True:
            agents = live.played.agents
            for agent, messages in step.observations.items():
                seat = agents.index(agent)
                live.heard[seat] += messages
                for message in messages:
                    if message.role == "system":
                        live.played.brief[seat] = message.content
            self._book(live.played, step)
            if not step.to_act:
                live.played.truncated = step.truncated
                self._end(live)
                return
            live.to_act = tuple(agents.index(agent) for agent in step.to_act)
            for seat in live.to_act:
                if seat in live.lanes:
                    if not self._tell(live, seat):
                        live.played.truncated = True
                        self._end(live)
                        return
                else:
                    text = live.scripts[seat].act(live.heard[seat])
                    live.heard[seat] = []
                    self._act(live, seat, text)
            if len(live.actions) < len(live.to_act):
                return
            step = self._step(live)

    @functools.partial(jax.profiler.annotate_function, name="env_step")
    def _step(self, live: _Live) -> Step:
        """Everybody who was asked has spoken."""
        said, live.actions = live.said(), {}
        live.played.transcript += said
        return live.env.step({live.played.agents[seat]: text for seat, text in said})

    def _book(self, played: Played, step: Step) -> None:
        for seat, agent in enumerate(played.agents):
            reward = float(step.rewards.get(agent, 0.0))
            played.rewards[seat] += reward
            if played.turn_rewards[seat]:
                played.turn_rewards[seat][-1] += reward
            played.infos[seat] = info = step.infos.get(agent, {})
            if len(played.valid[seat]) < len(played.texts[seat]):
                played.valid[seat].append(bool(info.get("valid", True)))

    def _tell(self, live: _Live, seat: int) -> bool:
        """Appends what a seat heard to its stream and lets it speak; False if it does not fit."""
        template, stream = self._template, live.played.streams[seat]
        index, slot = live.lanes[seat]
        engine = self._engines[index]
        ids: list[int] = []
        if stream.turns:
            ids += [template.end] if live.cut[seat] else []
            ids += template.after_end
        ids += template.render(live.heard[seat])
        ids += template.reply
        live.heard[seat] = []
        if len(ids) > engine.room(slot):
            return False
        stream.hear(ids)
        engine.say(slot, ids, self._turn_budget)
        return True

    def _spoke(self, index: int, turn: Turn) -> None:
        game, seat = self._owner[index, turn.slot]
        live = self._live[game]
        live.played.streams[seat].say(turn.tokens, turn.logprobs, turn.values)
        live.cut[seat] = turn.end != "stop"
        if turn.end == "cache":
            live.played.truncated = True
            live.played.turn_rewards[seat].append(0.0)
            live.played.texts[seat].append(self._template.decode(turn.tokens))
            live.played.valid[seat].append(False)
            self._end(live)
            return
        self._act(live, seat, self._template.decode(turn.tokens))
        if len(live.actions) == len(live.to_act):
            self._take(live, self._step(live))

    def _act(self, live: _Live, seat: int, text: str) -> None:
        played = live.played
        played.texts[seat].append(text)
        played.turn_rewards[seat].append(0.0)
        live.actions[seat] = text

    def _end(self, live: _Live) -> None:
        if live.played.truncated:
            # Words that reached nobody because somebody else's stream was full.
            live.played.transcript += live.said()
            for texts, valid in zip(live.played.texts, live.played.valid, strict=True):
                valid += [True] * (len(texts) - len(valid))
        for index, slot in live.lanes.values():
            del self._owner[index, slot]
            self._engines[index].close(slot)
        del self._live[live.played.game.id]
        self.finished.append(live.played)
