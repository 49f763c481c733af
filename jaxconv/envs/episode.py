"""One conversation played to its end by players, and its record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxconv.data.conversation import Message
from jaxconv.envs.base import Env, Player


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished conversation.

    Attributes:
      seed: what the environment was reset with.
      agents: the names, in seat order.
      views: each agent's conversation in chat form: its brief as the system message, others' words
        as user messages with their names, its own words as the assistant's.
      transcript: what everybody heard, in order, with names.
      rewards: the sum over the episode for each agent.
      infos: those of the last step.
    """

    seed: int
    agents: tuple[str, ...]
    views: Mapping[str, list[Message]]
    transcript: tuple[Message, ...]
    rewards: Mapping[str, float]
    infos: Mapping[str, dict]


def play(env: Env, players: Callable[[Env], Mapping[str, Player]], seed: int) -> Episode:
    """Resets `env` with `seed`, asks `players` who plays, and lets them talk until the end.

    `players` is called once after the reset, when the agents' names are known.
    """
    step = env.reset(seed)
    cast = players(env)
    views: dict[str, list[Message]] = {agent: [] for agent in env.agents}
    read = dict.fromkeys(env.agents, 0)
    rewards = dict.fromkeys(env.agents, 0.0)
    transcript = []
    while True:
        for agent, messages in step.observations.items():
            views[agent].extend(messages)
        for agent, reward in step.rewards.items():
            rewards[agent] += reward
        if not step.to_act:
            return Episode(seed, env.agents, views, tuple(transcript), rewards, step.infos)
        actions = {}
        for agent in step.to_act:
            view = views[agent]
            text = cast[agent].act(view[read[agent] :])
            view.append(Message("assistant", text))
            read[agent] = len(view)
            actions[agent] = text
            transcript.append(Message("user", text, agent))
        step = env.step(actions)
