"""Token streams of finished conversations as arrays, in the layout of the advantage estimators."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Streams of one batch; T is the longest stream's padded length, N the most own turns.

    Attributes:
        tokens: ids of each stream, ragged.
        turn_ids: int32 [B, T], own turn of each action token, -1 elsewhere.
        logprob: float32 [B, T], recorded when the token was sampled.
        value: float32 [B, T], critic before the token, recorded with it.
        turn_rewards: float32 [B, N].
        keep_turns: bool [B, N], False for turns that the quality filter flagged.
        team: int32 [B].
        truncated: bool [B], cut with the outcome unknown.
    """

    tokens: list[list[int]]
    turn_ids: np.ndarray
    logprob: np.ndarray
    value: np.ndarray
    turn_rewards: np.ndarray
    keep_turns: np.ndarray
    team: np.ndarray
    truncated: np.ndarray

    @property
    def lengths(self) -> list[int]:
        return [len(t) for t in self.tokens]
