"""Bargaining: two to five agents with private goals, limits and manners talk until they agree."""

from jaxconv.envs.bargaining.env import Bargaining, Options, profiles, rules
from jaxconv.envs.bargaining.evaluator import evaluate
from jaxconv.envs.bargaining.scripted import (
    HELD_OUT,
    TEMPERAMENTS,
    TRAINING,
    ScriptedPlayer,
    Temperament,
    scripted_corpus,
    scripted_player,
)

__all__ = [
    "HELD_OUT",
    "TEMPERAMENTS",
    "TRAINING",
    "Bargaining",
    "Options",
    "ScriptedPlayer",
    "Temperament",
    "evaluate",
    "profiles",
    "rules",
    "scripted_corpus",
    "scripted_player",
]
