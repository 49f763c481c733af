"""The evidence that self-play made a better model, and that nothing else explains it.

* `gain/side_k`, `gain/overall`: two players; score of the trained model in seat k with the frozen
  model elsewhere, minus the frozen model's in seat k of the all-frozen game, on the same episodes.
* null: the all-frozen game against itself sampled anew.
* sharper: the frozen model at a lower temperature, which is what a gain from mere determinism would
  look like.
* every scripted temperament, in the same seats against the same frozen model.
* transfer: trained minus frozen against temperaments that neither training stage has seen.
"""

import dataclasses

import numpy as np

from jaxconv.envs import DIMENSIONS
from jaxconv.evals.arena import Pairing, Results, advantage, level, one_seat, scores
from jaxconv.evals.report import Report, table
from jaxconv.evals.statistics import Estimate, bootstrap_mean


@dataclasses.dataclass(frozen=True)
class Study:
    """What is played.

    Attributes:
        trained, frozen, sharp: names of the policies.
        scripts: temperaments that training has seen.
        held_out: those it has not.
        players: numbers of agents.
        games: per pairing and seat among policies.
        script_games: per pairing and seat with a script.
        league: also a round robin of everybody with everybody.
        seed: of the intervals.
    """

    trained: str
    frozen: str
    sharp: str
    scripts: tuple[str, ...]
    held_out: tuple[str, ...]
    players: tuple[int, ...]
    games: int
    script_games: int
    league: bool
    seed: int

    @property
    def everybody(self) -> tuple[str, ...]:
        return (self.trained, self.frozen, *self.scripts, *self.held_out)

    def games_of(self, player: str, others: str) -> int:
        """Episodes of a pairing: fewer where a script plays that training has seen."""
        return self.script_games if {player, others} & set(self.scripts) else self.games

    def pairs(self) -> list[tuple[str, str]]:
        """(player in one seat, player in all others), in the order of the table."""
        scripts = (*self.scripts, *self.held_out)
        return [
            (self.trained, self.frozen),
            (self.frozen, self.frozen),
            (self.sharp, self.frozen),
            (self.trained, self.trained),
            *((script, self.frozen) for script in scripts),
            *((self.trained, script) for script in scripts),
            *((self.frozen, script) for script in scripts),
        ]

    def pairings(self) -> list[Pairing]:
        """Everything that has to be played, once each."""
        pairs = self.pairs()
        if self.league:
            pairs += [(player, others) for player in self.everybody for others in self.everybody]
        out = []
        for players in self.players:
            out.append(Pairing((self.frozen,) * players, self.games, replica=1))
            for player, others in dict.fromkeys(pairs):
                out += [
                    Pairing(one_seat(player, seat, others, players), self.games_of(player, others))
                    for seat in range(players)
                ]
        return list(dict.fromkeys(out))


def evaluate(study: Study, results: Results) -> Report:
    """Numbers and tables of a played study; see the module's text for what each name means."""
    report = Report()
    for players in study.players:
        prefix = "" if players == 2 else f"players_{players}/"
        _gains(report, study, results, players, prefix)
        _scripts(report, study, results, players, prefix)
        heading = f"Cross-play, {players} players"
        report.sections[heading] = _table(study, results, players)
        if study.league:
            _league(report, study, results, players, prefix)
    report.notes += doubts(report)
    return report


def doubts(report: Report) -> list[str]:
    """What a reader of the gain should know, in words; nothing where all controls are as they
    should be and no script does better."""
    out = []
    gains = {n: e for n, e in report.results.items() if n.startswith("gain/")}
    unclear = [name for name, gain in gains.items() if not gain.ci95[0] > 0]
    if unclear:
        out.append(f"Not clear of zero: {', '.join(unclear)}.")
    worse = [n for n, e in report.results.items() if "transfer/" in n and e.ci95[1] < 0]
    if worse:
        out.append(f"Wholly below zero: {', '.join(worse)}.")
    shifted = [
        name
        for name, null in report.baselines.items()
        if "null/" in name and not null.ci95[0] <= 0 <= null.ci95[1]
    ]
    if shifted:
        out.append(
            f"The frozen model against itself differs from zero in {', '.join(shifted)}; of 95 % "
            "intervals one in twenty does by chance."
        )
    better = [
        f"{name.removeprefix('script/')} ({script.value:+.2f})"
        for name, script in report.baselines.items()
        if name.startswith("script/") and gains and script.value > gains["gain/overall"].value
    ]
    if better:
        out.append(
            f"The trained model gains {gains['gain/overall'].value:+.2f} over its frozen start in "
            f"the same seat; in its place do better: {', '.join(better)}."
        )
    sharper = report.baselines.get("sharper/overall")
    if sharper and gains and sharper.value >= gains["gain/overall"].value:
        out.append("Sharper sampling of the frozen model alone explains the gain.")
    return out


def _gains(report: Report, study: Study, results: Results, players: int, prefix: str) -> None:
    def versus_frozen(player, games=study.games, **options):
        return advantage(
            results,
            player,
            study.frozen,
            study.frozen,
            players=players,
            games=games,
            seed=study.seed,
            **options,
        )

    name = "gain" if players == 2 else f"{prefix}advantage"
    for side, estimate in versus_frozen(study.trained).items():
        report.results[f"{name}/{side}"] = estimate
    for dimension in DIMENSIONS:
        gained = versus_frozen(study.trained, measure=dimension)
        report.results[f"{prefix}dimension/{dimension}"] = gained["overall"]
    for measure in ("payoff", "deal"):
        gained = versus_frozen(study.trained, measure=measure)
        report.results[f"{prefix}{measure}"] = gained["overall"]
    # The same cast sampled anew: with one policy in every seat, all seats are one pairing.
    for side, estimate in versus_frozen(study.frozen, replicas=(1, 0)).items():
        report.baselines[f"{prefix}null/{side}"] = estimate
    for side, estimate in versus_frozen(study.sharp).items():
        report.baselines[f"{prefix}sharper/{side}"] = estimate
    for script in (*study.scripts, *study.held_out):
        gained = _against_frozen_games(study, results, script, players)
        report.baselines[f"{prefix}script/{script}"] = gained["overall"]
    for player, where in ((study.trained, report.results), (study.frozen, report.baselines)):
        standing = level(
            results, player, study.frozen, players=players, games=study.games, seed=study.seed
        )
        where[f"{prefix}invalid/{player}"] = standing["invalid"]
        where[f"{prefix}deal_rate/{player}"] = standing["deal"]


def _against_frozen_games(study: Study, results: Results, script: str, players: int):
    """A script in one seat against the frozen model, minus the frozen model there."""
    short = {
        Pairing(p.cast, study.script_games, p.replica): games[: study.script_games]
        for p, games in results.items()
        if set(p.cast) <= {study.frozen, script}
    }
    return advantage(
        short,
        script,
        study.frozen,
        study.frozen,
        players=players,
        games=study.script_games,
        seed=study.seed,
    )


def _scripts(report: Report, study: Study, results: Results, players: int, prefix: str) -> None:
    for kind, scripts in (("versus", study.scripts), ("transfer", study.held_out)):
        for script in scripts:
            for measure, suffix in (("overall", ""), ("deal", "/deal_rate")):
                report.results[f"{prefix}{kind}/{script}{suffix}"] = advantage(
                    results,
                    study.trained,
                    study.frozen,
                    script,
                    players=players,
                    games=study.games_of(study.trained, script),
                    seed=study.seed,
                    measure=measure,
                )["overall"]


def _table(study: Study, results: Results, players: int) -> str:
    header = (
        "player",
        "against",
        *(f"score in seat {seat}" for seat in range(players)),
        "payoff",
        "deal rate",
        "invalid turns",
        "cut games",
        "games a seat",
    )
    rows = []
    for player, others in study.pairs():
        games = study.games_of(player, others)
        standing = level(results, player, others, players=players, games=games, seed=study.seed)
        rows.append(
            [
                player,
                _named(study, others),
                *(_interval(side) for side in standing["sides"]),
                *(_interval(standing[name]) for name in ("payoff", "deal", "invalid")),
                f"{standing['cut']:.3f}",
                str(games),
            ]
        )
    return table(header, rows)


def _league(report: Report, study: Study, results: Results, players: int, prefix: str) -> None:
    """Everybody in every seat against everybody: mean score over seats and opponents."""
    n = study.script_games  # the episodes that every pairing has played
    means: dict[str, Estimate] = {}
    rows = []
    for player in study.everybody:
        cells = []
        for others in study.everybody:
            games = study.games_of(player, others)
            cast = [one_seat(player, seat, others, players) for seat in range(players)]
            sides = [scores(results[Pairing(c, games)], seat)[:n] for seat, c in enumerate(cast)]
            cells.append(np.mean(sides, axis=0))
        means[player] = bootstrap_mean(np.mean(cells, axis=0), seed=study.seed, unit="points")
        where = report.results if player == study.trained else report.baselines
        where[f"{prefix}league/{player}"] = means[player]
        rows.append([player, *(f"{cell.mean():.2f}" for cell in cells), _interval(means[player])])
    rows.sort(key=lambda row: -means[row[0]].value)
    report.sections[f"League, {players} players"] = (
        "Mean overall score of the row's player in every seat, the column's in all others.\n\n"
        + table(("player", *study.everybody, "mean"), rows)
    )
    best = rows[0][0]
    report.notes.append(
        f"League with {players} players: best mean score {best} ({means[best].value:.3f}); "
        f"{study.trained} {means[study.trained].value:.3f}, "
        f"{study.frozen} {means[study.frozen].value:.3f}."
    )


def _named(study: Study, name: str) -> str:
    return f"{name} (held out)" if name in study.held_out else name


def _interval(estimate: Estimate) -> str:
    low, high = estimate.ci95
    return f"{estimate.value:.2f} [{low:.2f}, {high:.2f}]"
