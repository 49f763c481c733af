"""From finished conversations to the arrays that training reads."""

from collections.abc import Sequence

import numpy as np

from jaxconv.data.trajectories import Trajectories
from jaxconv.errors import Failed
from jaxconv.rollout.selfplay import Played


def to_trajectories(
    games: Sequence[Played],
    keep: Sequence[Sequence[Sequence[bool]]],
    teams: Sequence[str],
    *,
    pad_streams: int,
    pad_tokens: int,
    pad_turns: int,
) -> Trajectories:
    """Collects every stream in which a policy spoke.

    Raises Failed when none did.

    Args:
        games: finished conversations.
        keep: [game][seat][turn], the quality filter's verdicts.
        teams: names; a stream's team is the index of its name.
        pad_streams, pad_tokens, pad_turns: each axis is padded to a multiple of this, so that few
            shapes are compiled.
    """
    rows = [
        (game, seat, keep[g][seat])
        for g, game in enumerate(games)
        for seat, stream in enumerate(game.streams)
        if stream.turns
    ]
    if not rows:
        raise Failed(
            f"nobody spoke in {len(games)} games: what agents are told first does not fit the cache"
        )
    b = _round_up(len(rows), pad_streams)
    t = _round_up(max(len(game.streams[seat].tokens) for game, seat, _ in rows), pad_tokens)
    n = _round_up(max(game.streams[seat].turns for game, seat, _ in rows), pad_turns)
    out = Trajectories(
        tokens=[game.streams[seat].tokens for game, seat, _ in rows],
        turn_ids=np.full((b, t), -1, np.int32),
        logprob=np.zeros((b, t), np.float32),
        value=np.zeros((b, t), np.float32),
        turn_rewards=np.zeros((b, n), np.float32),
        keep_turns=np.ones((b, n), bool),
        team=np.zeros(b, np.int32),
        truncated=np.zeros(b, bool),
    )
    for i, (game, seat, kept) in enumerate(rows):
        stream = game.streams[seat]
        size = len(stream.tokens)
        out.turn_ids[i, :size] = stream.turn
        out.logprob[i, :size] = stream.logprob
        out.value[i, :size] = stream.value
        out.turn_rewards[i, : stream.turns] = game.turn_rewards[seat]
        out.keep_turns[i, : stream.turns] = kept
        out.team[i] = list(teams).index(game.teams[seat])
        out.truncated[i] = game.truncated
    return out


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
