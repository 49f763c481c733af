"""Conversations on the device: the slot engine and self-play."""

from jaxconv.rollout.engine import Engine, EngineShape, Sampling, Turn
from jaxconv.rollout.selfplay import Game, Played, SelfPlay

__all__ = ["Engine", "EngineShape", "Game", "Played", "Sampling", "SelfPlay", "Turn"]
