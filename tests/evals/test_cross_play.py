"""The study: everything that its tables need is played once, and every name means what it says."""

import dataclasses
import random

import pytest

from jaxconv.envs import DIMENSIONS
from jaxconv.evals import cross_play
from jaxconv.evals.arena import Pairing
from jaxconv.evals.cross_play import Study
from jaxconv.evals.report import Report
from jaxconv.evals.statistics import Estimate

STUDY = Study(
    trained="trained",
    frozen="frozen",
    sharp="sharp",
    scripts=("greedy", "fair"),
    held_out=("late",),
    players=(2,),
    games=6,
    script_games=4,
    league=False,
    seed=0,
)


def results_of(study, played, score):
    """Every pairing with `score(cast, episode, replica)` -> scores by seat."""
    return {
        pairing: [
            played(score(pairing.cast, episode, pairing.replica), cast=pairing.cast)
            for episode in range(pairing.games)
        ]
        for pairing in study.pairings()
    }


def constant(strength):
    """Players that always reach the same score, whoever sits opposite."""
    return lambda cast, episode, replica: [strength[player] for player in cast]


STRENGTH = {"trained": 3.0, "frozen": 1.0, "sharp": 1.5, "greedy": 2.0, "fair": 0.5, "late": 1.0}


@pytest.mark.parametrize("players", [(2,), (3,), (2, 3)])
@pytest.mark.parametrize("league", [False, True])
def test_the_pairings_are_unique_and_all_that_the_report_reads(players, league, played):
    study = dataclasses.replace(STUDY, players=players, league=league)
    pairings = study.pairings()
    assert len(pairings) == len(set(pairings))
    assert {pairing.players for pairing in pairings} == set(players)
    results = results_of(study, played, constant(STRENGTH))

    read = set()

    class Watched(dict):
        def __getitem__(self, pairing):
            read.add(pairing)
            return super().__getitem__(pairing)

    cross_play.evaluate(study, Watched(results))  # raises KeyError if one is missing
    assert set(pairings) == read  # nothing is played for nothing


def test_who_plays_how_often():
    pairings = STUDY.pairings()
    for cast in (("trained", "frozen"), ("frozen", "trained"), ("frozen", "frozen")):
        assert Pairing(cast, 6) in pairings
    assert Pairing(("frozen", "frozen"), 6, replica=1) in pairings
    for cast in (("sharp", "frozen"), ("frozen", "sharp"), ("trained", "trained")):
        assert Pairing(cast, 6) in pairings
    # Those that training has not seen are as many games as the policies among themselves.
    for script, games in (("greedy", 4), ("fair", 4), ("late", 6)):
        for other in ("trained", "frozen"):
            assert Pairing((script, other), games) in pairings
            assert Pairing((other, script), games) in pairings
    league = dataclasses.replace(STUDY, league=True).pairings()
    assert {("greedy", "late"), ("late", "greedy"), ("late", "late")} <= {p.cast for p in league}
    assert not any("sharp" in p.cast and "greedy" in p.cast for p in league)


def test_gains_controls_and_transfer_by_hand(played):
    report = cross_play.evaluate(STUDY, results_of(STUDY, played, constant(STRENGTH)))
    results, baselines = report.results, report.baselines
    for side in ("side_0", "side_1", "overall"):
        assert results[f"gain/{side}"].value == 2.0 and results[f"gain/{side}"].n == 6
        assert baselines[f"null/{side}"].value == 0.0
        assert baselines[f"sharper/{side}"].value == 0.5
    for dimension in DIMENSIONS:
        assert results[f"dimension/{dimension}"].value == 2.0
    assert baselines["script/greedy"].value == 1.0
    assert baselines["script/fair"].value == -0.5
    assert baselines["script/greedy"].n == 4
    for name, games in (("versus/greedy", 4), ("versus/fair", 4), ("transfer/late", 6)):
        assert results[name].value == 2.0 and results[name].n == games
        assert results[f"{name}/deal_rate"].unit == "rate"
    assert {"invalid/trained", "deal_rate/trained"} <= results.keys()
    assert {"invalid/frozen", "deal_rate/frozen"} <= baselines.keys()
    assert not report.notes


def test_only_the_three_definitions_are_called_gain(played):
    study = dataclasses.replace(STUDY, players=(2, 3), league=True)
    report = cross_play.evaluate(study, results_of(study, played, constant(STRENGTH)))
    named = [n for n in (*report.results, *report.baselines) if n.split("/")[0] == "gain"]
    assert named == ["gain/side_0", "gain/side_1", "gain/overall"]
    assert not any("gain" in n for n in report.results if n not in named)
    assert report.results["players_3/advantage/overall"].value == 2.0


def test_the_gain_is_not_blurred_by_hard_and_easy_episodes(played):
    rng = random.Random(0)
    luck = [rng.uniform(-3, 3) for _ in range(STUDY.games)]

    def score(cast, episode, replica):
        return [luck[episode] + STRENGTH[player] for player in cast]

    gain = cross_play.evaluate(STUDY, results_of(STUDY, played, score)).results["gain/overall"]
    assert gain.value == pytest.approx(2.0) and gain.ci95 == pytest.approx((2.0, 2.0))


def test_the_null_is_sampling_noise_alone(played):
    rng = random.Random(1)

    def score(cast, episode, replica):
        noisy = cast == ("frozen", "frozen") and replica == 1
        return [1.0 + (rng.uniform(-1, 1) if noisy else 0.0) for _ in cast]

    report = cross_play.evaluate(STUDY, results_of(STUDY, played, score))
    null = report.baselines["null/overall"]
    assert null.ci95[0] < null.value < null.ci95[1]
    assert report.results["gain/overall"].value == 0.0  # replica 0 is the baseline of the gain


@pytest.mark.parametrize("players", [(2,), (3,), (2, 3)])
def test_a_transfer_wholly_below_zero_is_said(players, played):
    def score(cast, episode, replica):
        lost = 4.0 if "late" in cast and "trained" in cast else 0.0
        return [STRENGTH[player] - lost for player in cast]

    study = dataclasses.replace(STUDY, players=players)
    [note] = cross_play.evaluate(study, results_of(study, played, score)).notes
    assert note.startswith("Wholly below zero: ") and "transfer/late" in note
    assert "versus" not in note


def test_the_table_shows_every_pair_with_intervals(played):
    report = cross_play.evaluate(STUDY, results_of(STUDY, played, constant(STRENGTH)))
    lines = report.sections["Cross-play, 2 players"].splitlines()
    assert len(lines) == 2 + len(STUDY.pairs())
    assert len({line.count("|") - line.count("\\|") for line in lines}) == 1
    assert any("late" in line and "held out" in line for line in lines)
    assert "score in seat 0" in lines[0].replace("\\", "")


def test_the_league_is_a_mean_over_seats_and_opponents(played):
    study = dataclasses.replace(STUDY, league=True)

    def score(cast, episode, replica):
        # The weaker the others, the better; the first seat is worth one point.
        return [
            STRENGTH[player] - sum(STRENGTH[o] for o in cast) + STRENGTH[player] + (seat == 0)
            for seat, player in enumerate(cast)
        ]

    report = cross_play.evaluate(study, results_of(study, played, score))
    mean_of_all = sum(STRENGTH[name] for name in study.everybody) / len(study.everybody)
    mean = {name: STRENGTH[name] - mean_of_all + 0.5 for name in study.everybody}
    lines = report.sections["League, 2 players"].splitlines()
    cells = [line.replace("\\", "").split("|")[1:-1] for line in lines[4:]]
    rows = [[cell.strip() for cell in row] for row in cells]
    assert [row[0] for row in rows] == sorted(study.everybody, key=lambda n: -mean[n])
    assert [float(row[-1].split()[0]) for row in rows] == pytest.approx(
        [mean[row[0]] for row in rows], abs=6e-3
    )
    league = {**report.results, **report.baselines}
    for name in study.everybody:
        assert league[f"league/{name}"].value == pytest.approx(mean[name])
    assert "league/trained" in report.results and "league/frozen" in report.baselines
    [note] = report.notes
    assert f"best mean score trained ({mean['trained']:.3f})" in note


@pytest.mark.parametrize(
    ("where", "name", "ci95", "says"),
    [
        ("results", "gain/side_1", (-0.1, 0.5), "Not clear of zero: gain/side_1."),
        ("results", "transfer/late", (-0.5, -0.1), "Wholly below zero: transfer/late."),
        ("baselines", "null/overall", (0.1, 0.5), "differs from zero in null/overall"),
        ("baselines", "sharper/overall", (1.5, 2.5), "alone explains the gain"),
        ("baselines", "script/fair", (1.0, 2.0), "in its place do better: fair (+1.50)."),
    ],
)
def test_what_speaks_against_a_gain_is_said(where, name, ci95, says):
    def estimate(low, high):
        return Estimate((low + high) / 2, (low, high), 10, "points")

    sound = Report(
        results={"gain/overall": estimate(0.5, 1.5), "gain/side_1": estimate(0.5, 1.0)},
        baselines={"null/overall": estimate(-0.2, 0.1), "sharper/overall": estimate(0.2, 0.4)},
    )
    assert cross_play.doubts(sound) == []
    getattr(sound, where)[name] = estimate(*ci95)
    [note] = cross_play.doubts(sound)
    assert says in note
