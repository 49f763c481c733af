"""Finished games made by hand."""

import pytest

from jaxconv.envs import DIMENSIONS
from jaxconv.rollout.selfplay import Game, Played
from jaxconv.rollout.stream import Stream


def make_played(
    scores: list[float | None],
    *,
    cast: tuple[str, ...] = ("a", "b"),
    id: int = 0,
    seed: int = 0,
    deal: bool = False,
    payoff: float | None = None,
    valid: list[list[bool]] | None = None,
    transcript: list[tuple[int, str]] = (),
) -> Played:
    """A game in which seat k scored `scores[k]` in every dimension; all None: it was cut."""
    n = len(scores)
    infos = [
        {}
        if score is None
        else {
            "dimensions": dict.fromkeys(DIMENSIONS, score),
            "overall": score,
            "deal": deal,
            "payoff": payoff,
            "end": "deal" if deal else "limit",
            "seat": seat,
        }
        for seat, score in enumerate(scores)
    ]
    valid = [[True]] * n if valid is None else valid
    return Played(
        game=Game(id, seed, cast),
        agents=tuple(f"agent{i}" for i in range(n)),
        teams=("all",) * n,
        streams=[Stream() for _ in range(n)],
        turn_rewards=[[0.0] * len(v) for v in valid],
        texts=[["words"] * len(v) for v in valid],
        valid=valid,
        rewards=[0.0] * n,
        infos=infos,
        transcript=list(transcript),
        brief=["brief"] * n,
        truncated=scores[0] is None,
    )


@pytest.fixture
def played():
    return make_played
