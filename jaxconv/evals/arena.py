"""Cross-play: who does how well against whom, on the same episodes.

Self-play reward says little about a policy: both sides drift together. Here a policy takes one seat
and another policy, or a script, all the others. Every pairing is played on the same seeds, so that
scores are compared episode by episode.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxconv import processes
from jaxconv.envs import DIMENSIONS, overall
from jaxconv.evals.statistics import (
    Estimate,
    bootstrap_mean,
    paired_difference,
    proportion,
    ratio,
)
from jaxconv.rollout.selfplay import Game, Played, SelfPlay
from jaxconv.rollout.shared import collect, share
from jaxconv.train import clock


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Who plays each seat, on how many episodes.

    `replica` tells apart pairings of the same players that differ in their sampling alone.
    """

    cast: tuple[str, ...]
    games: int
    replica: int = 0

    @property
    def players(self) -> int:
        return len(self.cast)


Results = Mapping[Pairing, Sequence[Played]]


def one_seat(player: str, seat: int, others: str, players: int) -> tuple[str, ...]:
    """A cast with `player` in one seat and `others` everywhere else."""
    return tuple(player if k == seat else others for k in range(players))


def play_all(
    selfplay: Callable[[int], SelfPlay],
    pairings: Iterable[Pairing],
    *,
    seed: int,
    first_id: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Pairing, list[Played]]:
    """Plays every pairing; episode i of each has the same seed. Processes share the games out.

    Args:
        selfplay: by number of players.
        pairings: duplicates are played once.
        seed: of the first episode.
        first_id: of the first game; ids go up from there.
        on_progress: called with games done and games in all; of several processes each counts its
            own for all.
    """
    pairings = list(dict.fromkeys(pairings))
    games: dict[Pairing, list[Game]] = {}
    for pairing in pairings:
        games[pairing] = [Game(first_id + i, seed + i, pairing.cast) for i in range(pairing.games)]
        first_id += pairing.games
    total, done, results = sum(map(len, games.values())), 0, {}
    for players in sorted({p.players for p in pairings}):
        table = selfplay(players)
        mine = [p for p in pairings if p.players == players]
        # Episode by episode rather than pairing by pairing: the engines of all stay busy.
        queue = [
            games[p][i] for i in range(max(p.games for p in mine)) for p in mine if i < p.games
        ]
        table.start(share(queue))
        with clock.spending(clock.EVALUATION):
            while table.advance():
                if on_progress:
                    here = min(len(table.finished) * processes.count(), len(queue))
                    on_progress(done + here, total)
            played = dict(zip(queue, collect(queue, table), strict=True))
        for pairing in mine:
            results[pairing] = [played[game] for game in games[pairing]]
        done += len(queue)
    return results


def scores(games: Sequence[Played], seat: int, measure: str = "overall") -> np.ndarray:
    """What one seat reached in each game: "overall", "payoff", "deal" or a dimension's name.

    A game that was cut from outside has no outcome: no deal, no payoff, and the lowest score of the
    batch (the lowest there can be, where every game was cut).
    """
    values = []
    for game in games:
        info = game.infos[seat]
        if measure in ("deal", "payoff"):
            values.append(float(info.get(measure) or 0.0))
        elif "dimensions" not in info:
            values.append(np.nan)
        elif measure == "overall":
            values.append(float(info["overall"]))
        else:
            values.append(float(info["dimensions"][measure]))
    out = np.array(values)
    if np.isnan(out).all():
        worst = {name: low for name, (low, _) in DIMENSIONS.items()}
        return np.full(len(out), overall(worst) if measure == "overall" else worst[measure])
    return np.where(np.isnan(out), np.nanmin(out), out)


def advantage(
    results: Results,
    player: str,
    baseline: str,
    others: str,
    *,
    players: int,
    games: int,
    seed: int,
    measure: str = "overall",
    replicas: tuple[int, int] = (0, 0),
) -> dict[str, Estimate]:
    """How much better `player` does than `baseline` in the same seat against the same others.

    Returns `side_0`, `side_1`, … and `overall`, the mean over the seats, paired by episode.
    """
    differences = []
    for seat in range(players):
        a = results[Pairing(one_seat(player, seat, others, players), games, replicas[0])]
        b = results[Pairing(one_seat(baseline, seat, others, players), games, replicas[1])]
        differences.append(scores(a, seat, measure) - scores(b, seat, measure))
    unit = "rate" if measure == "deal" else "points"
    zero = np.zeros(games)
    sides = {
        f"side_{seat}": paired_difference(d, zero, seed=seed, unit=unit)
        for seat, d in enumerate(differences)
    }
    mean = np.mean(differences, axis=0)
    return sides | {"overall": paired_difference(mean, zero, seed=seed, unit=unit)}


def level(
    results: Results, player: str, others: str, *, players: int, games: int, seed: int
) -> dict[str, Estimate | list[Estimate] | float]:
    """Where a player stands against others: overall score by seat, payoff, deal rate, invalid rate.

    `cut` is the share of games that outgrew a cache and have no outcome. Payoff, deal rate and
    invalid rate are over all seats. The episode is the independent unit.
    """
    by_seat = [
        results[Pairing(one_seat(player, seat, others, players), games)] for seat in range(players)
    ]
    sides = [
        bootstrap_mean(scores(g, seat), seed=seed, unit="points") for seat, g in enumerate(by_seat)
    ]
    payoff = np.mean([scores(g, seat, "payoff") for seat, g in enumerate(by_seat)], axis=0)
    deals = sum(scores(g, seat, "deal") for seat, g in enumerate(by_seat))
    turns = sum(np.array([len(g.valid[seat]) for g in gs]) for seat, gs in enumerate(by_seat))
    understood = sum(np.array([sum(g.valid[seat]) for g in gs]) for seat, gs in enumerate(by_seat))
    return {
        "sides": sides,
        "payoff": bootstrap_mean(payoff, seed=seed, unit="points"),
        "deal": _rate(deals, np.full(games, players), seed),
        "invalid": _rate(turns - understood, turns, seed),
        "cut": float(np.mean([game.truncated for gs in by_seat for game in gs])),
    }


def _rate(counts: np.ndarray, totals: np.ndarray, seed: int) -> Estimate:
    """Σ counts / Σ totals over episodes; where all agree on 0 or 1, with Wilson's interval."""
    used = totals > 0
    episodes, hits = int(used.sum()), counts[used]
    if episodes < 2:
        # Too little to say anything.
        return Estimate(float(hits.sum() / max(totals.sum(), 1)), (0.0, 1.0), episodes, "rate")
    if not hits.any() or np.array_equal(hits, totals[used]):
        return proportion(episodes if hits.any() else 0, episodes)
    return ratio(hits, totals[used], seed=seed, unit="rate")
