"""Conversations on disk, one a line, in the shape of SOTOPIA's episode log."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

from jaxconv import envs
from jaxconv.rollout.selfplay import Played
from jaxconv.train import atomic
from jaxconv.train.workdir import Workdir

FILE = "episodes.jsonl"


def write(
    workdir: Workdir, name: str, make_env: Callable[[int], envs.Env], played: Iterable[Played]
) -> None:
    """Writes `artifacts/episodes.jsonl`.

    Args:
        workdir: only its writer process writes.
        name: of the environment.
        make_env: a new environment for so many agents.
        played: finished conversations.
    """
    if workdir.is_writer:
        lines = [
            json.dumps(episode_log(name, make_env(len(game.agents)), game), ensure_ascii=False)
            for game in played
        ]
        atomic.write_text(workdir.artifacts / FILE, "".join(f"{line}\n" for line in lines))


def episode_log(name: str, env: envs.Env, game: Played) -> dict[str, Any]:
    """One conversation with the fields of SOTOPIA's `EpisodeLog`.

    Profiles stand in the record itself instead of the keys of a database. `messages` are by turn,
    each (sender, receiver, text), the briefs first; `rewards` are (overall score, score by
    dimension) of each agent, None where the conversation was cut. `seed` starts it again.
    """
    env.reset(game.game.seed)
    environment, agents = envs.profiles(name, env)
    briefs = [
        ("Environment", agent, brief) for agent, brief in zip(game.agents, game.brief, strict=True)
    ]
    said = [
        [(game.agents[seat], "Environment", f'said: "{text}"')] for seat, text in game.transcript
    ]
    return {
        "environment": dataclasses.asdict(environment),
        "agents": [dataclasses.asdict(agent) for agent in agents],
        "tag": str(game.infos[0].get("end", "cut")),
        "models": [game.game.player(seat) for seat in range(len(game.agents))],
        "messages": [briefs, *said],
        "rewards": [
            (info["overall"], info["dimensions"]) if "overall" in info else None
            for info in game.infos
        ],
        "seed": game.game.seed,
    }
