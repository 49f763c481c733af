"""A tokenizer, a template, a small actor-critic that talks in short random turns, and worlds."""

import jax
import pytest

from jaxconv.data.conversation import Message
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.envs.base import Step, check_actions
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead


@pytest.fixture(scope="session")
def template():
    return take_apart(train_tokenizer(["talk as agent0 to agent1 and agent2"] * 3, 280))


@pytest.fixture(scope="session")
def make_model(template):
    """seed -> an actor-critic whose turns end after a few tokens and whose values vary."""
    config = DecoderConfig(
        family="llama",
        vocab_size=280,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=160,
    )

    def make(seed: int) -> ActorCritic:
        key = jax.random.key(seed)
        decoder = jax.jit(lambda key: Decoder(config, key))(key)
        head = decoder.lm_head[...] * 3
        # A louder column: the end token comes about every fifth time.
        head = head.at[:, template.end].multiply(4)
        decoder.lm_head[...] = head
        value_head = ValueHead(config.embed_dim, 0.25)
        value_head.kernel[...] = jax.random.normal(key, value_head.kernel.shape)
        return ActorCritic(decoder, value_head)

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model(0)


@pytest.fixture(scope="session")
def weights(model):
    return unstack(model)


@pytest.fixture(scope="session")
def config(model):
    return model.decoder.config


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


@pytest.fixture(scope="session")
def talk():
    """The class of a small world."""
    return Talk


@pytest.fixture(scope="session")
def make_counter():
    """(name, env, agent, seed) -> a script for any world."""
    return lambda name, env, agent, seed: Counter(name)
