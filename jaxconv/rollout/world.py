"""Where a config's models talk: its environment, engines and tables."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from functools import partial

import jax

from jaxconv import envs
from jaxconv.data.template import ChatTemplate
from jaxconv.errors import Refused
from jaxconv.models import kernels
from jaxconv.models.config import DecoderConfig
from jaxconv.models.device_group import device_groups, refuse_uneven
from jaxconv.models.handover import hand_over
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
        device_groups(self.config.rollout.tensor, jax.local_devices())
        refuse_uneven(self.decoder, self.config.rollout.tensor)
        self.kernels()  # refuses what cannot run

    def kernels(self) -> dict[str, str]:
        """Which forms of attention and sampling run, by the operation's name."""
        return kernels.chosen(self.decoder, self.config.rollout.lengths, self.config.rollout.tensor)

    @property
    def first_seed(self) -> int:
        return self.config.seed * SEEDS_OF_A_RUN

    def engines(self, model: ActorCritic) -> list[Engine]:
        """Engines for one policy, with its weights, spread over the devices of this process.

        Each spans `config.rollout.tensor` of them. Two neighbours share their devices: the agents
        of one game sit in them and speak in turn, so that every device has somebody who speaks.
        """
        engines = self._engines(self.config.rollout.temperature)
        set_weights(engines, model)
        return engines

    def twins(self, engines: Sequence[Engine], temperature: float) -> list[Engine]:
        """Engines that share the weights of `engines`, and draw at another temperature."""
        twins = self._engines(temperature)
        for twin, engine in zip(twins, engines, strict=True):
            twin.weights = engine.weights
        return twins

    def _engines(self, temperature: float) -> list[Engine]:
        r = self.config.rollout
        groups = device_groups(r.tensor, jax.local_devices())
        return [
            Engine(
                self.decoder,
                engine_shape(self.config),
                stop_ids=[self.template.end],
                key=jax.random.key(self.config.seed),
                sampling=Sampling(temperature),
                group=groups[i // 2 % len(groups)],
            )
            for i in range(r.engines)
        ]

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


@functools.partial(jax.profiler.annotate_function, name="sync")
def set_weights(engines: Sequence[Engine], model: ActorCritic) -> None:
    """Gives every engine the model's weights in rollout layout, one copy a group of devices."""
    for engine in engines:
        engine.weights = None  # no third copy while the new one is made
    copies = hand_over(model, [engine.group for engine in engines])
    for engine in engines:
        engine.weights = copies[engine.group]


def scripted_episodes(config, seeds: int, n: int) -> Iterator[envs.Episode]:
    """Episodes among the training scripts, from the seed `seeds` of the run on."""
    training, _ = envs.temperaments(config.env.name)
    return envs.scripted_corpus(
        config.env.name, env_options(config), n, config.seed * SEEDS_OF_A_RUN + seeds, training
    )
