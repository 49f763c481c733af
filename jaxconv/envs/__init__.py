"""Worlds in which agents talk. `make` builds one by name; scripts play in it by temperament."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from types import ModuleType

from jaxconv.envs.base import Env, Player, Step, check_actions
from jaxconv.envs.dimensions import DIMENSIONS, normalised, overall
from jaxconv.envs.episode import Episode, play
from jaxconv.envs.profiles import AgentProfile, EnvironmentProfile
from jaxconv.errors import Refused

__all__ = [
    "DIMENSIONS",
    "AgentProfile",
    "Env",
    "EnvironmentProfile",
    "Episode",
    "Player",
    "Step",
    "check_actions",
    "make",
    "normalised",
    "overall",
    "play",
    "players",
    "profiles",
    "rules",
    "scripted_corpus",
    "temperaments",
]

_WORLDS = {"bargaining": ("jaxconv.envs.bargaining", "Bargaining")}


def _world(name: str) -> ModuleType:
    if name not in _WORLDS:
        raise Refused(f"environment is {name!r}; expected one of {', '.join(_WORLDS)}")
    return import_module(_WORLDS[name][0])


def make(name: str, **options: object) -> Env:
    """The environment `name` with `options`. Raises Refused for a name or option that is unknown,
    or a value that cannot be."""
    world = _world(name)
    known = [field.name for field in fields(world.Options)]
    for option in options:
        if option not in known:
            raise Refused(f"{name} has no option {option!r}; expected one of {', '.join(known)}")
    return getattr(world, _WORLDS[name][1])(world.Options(**options))


def temperaments(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The scripts of an environment: (for training and pools, held out from both)."""
    world = _world(name)
    return world.TRAINING, world.HELD_OUT


def players(name: str, env: Env, temperament: str, agent: str, seed: int) -> Player:
    """A script of this temperament for one agent of `env`, which must have been reset."""
    return _world(name).scripted_player(env, temperament, agent, seed)


def profiles(name: str, env: Env) -> tuple[EnvironmentProfile, tuple[AgentProfile, ...]]:
    """What the episode of `env` is about and who is in it, secrets included; after a reset."""
    return _world(name).profiles(env)


def rules(name: str, env: Env, agent: str) -> str:
    """How the episode of `env` goes and what `agent` may say, for somebody who is new to it."""
    return _world(name).rules(env, agent)


def scripted_corpus(
    name: str, options: Mapping[str, object], n: int, seed: int, temperaments: Sequence[str]
) -> Iterator[Episode]:
    """`n` episodes of the environment among scripts, from episode `seed` on."""
    return _world(name).scripted_corpus(options, n, seed, temperaments)
