"""Where a config's models talk: its environment, engines and tables."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax

from jaxconv import envs
from jaxconv.data.template import ChatTemplate
from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.heads import ActorCritic
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.rollout.selfplay import SelfPlay

# Episodes of one run never share a seed across its stages, nor with another run's.
SEEDS_OF_A_RUN = 1 << 32


def env_options(config, players: int | None = None) -> dict:
    """Options of the environment; with a fixed number of players for the arena."""
    options = config.env.to_dict()
    del options["name"]
    return options if players is None else options | {"players": (players,)}


def make_env(config, players: int | None = None) -> envs.Env:
    """A new environment, of a fixed number of agents if that is given."""
    return envs.make(config.env.name, **env_options(config, players))


def engine_shape(config) -> EngineShape:
    r = config.rollout
    return EngineShape(
        slots=r.slots,
        lengths=tuple(r.lengths),
        burst=r.burst,
        leave=r.leave,
        prefill_rows=tuple(r.prefill_rows),
        prefill_tokens=tuple(r.prefill_tokens),
    )


@dataclasses.dataclass(frozen=True)
class World:
    """What every stage needs to let models talk in the environment."""

    config: object
    template: ChatTemplate
    decoder: DecoderConfig

    def __post_init__(self):
        longest = self.config.rollout.lengths[-1]
        if longest > self.decoder.max_positions:
            raise Refused(
                f"config.rollout.lengths[-1]={longest}; "
                f"the model has {self.decoder.max_positions} positions"
            )

    @property
    def first_seed(self) -> int:
        return self.config.seed * SEEDS_OF_A_RUN

    def engines(self, model: ActorCritic, temperature: float | None = None) -> list[Engine]:
        """Engines for one policy, with its weights, spread over the devices of this process.

        Two neighbours share a device: the agents of one game sit in them and speak in turn, so that
        every device has somebody who speaks.
        """
        r = self.config.rollout
        devices = jax.local_devices()
        engines = [
            Engine(
                self.decoder,
                engine_shape(self.config),
                stop_ids=[self.template.end],
                key=jax.random.key(self.config.seed),
                sampling=Sampling(r.temperature if temperature is None else temperature),
                device=devices[i // 2 % len(devices)],
            )
            for i in range(r.engines)
        ]
        set_weights(engines, model)
        return engines

    def table(self, policies: dict[str, Sequence[Engine]], players: int | None = None) -> SelfPlay:
        """Where games among policies and scripts are played."""
        config = self.config
        return SelfPlay(
            partial(make_env, config, players),
            lambda name, env, agent, seed: envs.players(config.env.name, env, name, agent, seed),
            self.template,
            policies,
            turn_budget=config.rollout.turn_budget,
            concurrent=config.rollout.slots * config.rollout.engines // 2,
        )


def set_weights(engines: Sequence[Engine], model: ActorCritic) -> None:
    """Gives every engine the model's weights in rollout layout, one copy a device."""
    weights = unstack(model)
    copies = {engine.device: jax.device_put(weights, engine.device) for engine in engines}
    for engine in engines:
        engine.weights = copies[engine.device]


def scripted_episodes(config, seeds: int, n: int) -> Iterator[envs.Episode]:
    """Episodes among the training scripts, from the seed `seeds` of the run on."""
    training, _ = envs.temperaments(config.env.name)
    return envs.scripted_corpus(
        config.env.name, env_options(config), n, config.seed * SEEDS_OF_A_RUN + seeds, training
    )
