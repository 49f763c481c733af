"""Prints how the scripts fare against each other: `python -m jaxconv.envs.bargaining --help`."""

import argparse
import time
from functools import partial
from itertools import product
from statistics import mean

from jaxconv.envs.bargaining.env import Bargaining, Options
from jaxconv.envs.bargaining.scenario import KINDS
from jaxconv.envs.bargaining.scripted import TEMPERAMENTS, ScriptedPlayer, scripted_player
from jaxconv.envs.dimensions import DIMENSIONS, overall
from jaxconv.envs.episode import Episode, play


def games(env: Bargaining, temperaments: tuple[str, ...], n: int) -> list[Episode]:
    """`n` games with these temperaments by seat, the last one filling further seats."""

    def cast(env: Bargaining, seed: int) -> dict[str, ScriptedPlayer]:
        by_seat = temperaments + temperaments[-1:] * len(env.agents)
        return {
            agent: scripted_player(env, temperament, agent, seed)
            for agent, temperament in zip(env.agents, by_seat, strict=False)
        }

    return [play(env, partial(cast, seed=seed), seed) for seed in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=200, help="games for each pair")
    parser.add_argument("--players", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, default="division")
    parser.add_argument("--show", type=int, default=0, help="transcripts to print first")
    args = parser.parse_args()
    env = Bargaining(Options(players=(args.players,), kinds=(args.kind,)))

    for episode in games(env, ("chatty", "fair"), args.show):
        for agent in episode.agents:
            print(episode.views[agent][0].content)
        for message in episode.transcript:
            print(f"  {message.name}: {message.content}")
        for agent in episode.agents:
            info = episode.infos[agent]
            scores = " ".join(f"{k[:6]} {v:.1f}" for k, v in info["dimensions"].items())
            print(f"  {agent}: {info['end']} payoff {info['payoff']} {scores}")
        print()

    print("seat 0 against the others: overall and payoff (0 without a deal) of seat 0")
    print(f"{'seat 0':11s}{'others':11s}{'overall':>8}{'payoff':>8}{'deal':>7}{'left':>6}", end="")
    print(f"{'turns':>7}{'words':>7}  {' '.join(name[:6].rjust(6) for name in DIMENSIONS)}")
    began, played = time.perf_counter(), 0
    for pair in product(TEMPERAMENTS, repeat=2):
        episodes = games(env, pair, args.games)
        played += len(episodes)
        infos = [e.infos[e.agents[0]] for e in episodes]
        scores = [info["dimensions"] for info in infos]
        words = [len(m.content.split()) for e in episodes for m in e.transcript]
        print(
            f"{pair[0]:11s}{pair[1]:11s}"
            f"{mean(overall(s) for s in scores):8.2f}"
            f"{mean(info['payoff'] or 0.0 for info in infos):8.2f}"
            f"{mean(info['deal'] for info in infos):7.2f}"
            f"{mean(info['end'] == 'left' for info in infos):6.2f}"
            f"{mean(len(e.transcript) for e in episodes):7.2f}{mean(words):7.2f}  "
            + " ".join(f"{mean(s[name] for s in scores):6.2f}" for name in DIMENSIONS)
        )
    print(f"{played / (time.perf_counter() - began):.0f} games a second")


if __name__ == "__main__":
    main()
