"""Cross-play: pairing by episode, seats, cut games, and who is asked to play what."""

import numpy as np
import pytest

from jaxconv.envs import DIMENSIONS
from jaxconv.evals.arena import Pairing, advantage, level, one_seat, play_all, scores


def test_one_seat_puts_the_player_there_and_the_others_elsewhere():
    assert one_seat("t", 1, "f", 3) == ("f", "t", "f")
    assert Pairing(("t", "f", "f"), 4).players == 3


def test_scores_of_a_seat_and_a_measure(played):
    games = [played([1.0, 2.0], deal=True, payoff=6), played([3.0, 4.0])]
    assert scores(games, 0).tolist() == [1.0, 3.0]
    assert scores(games, 1).tolist() == [2.0, 4.0]
    assert scores(games, 1, "goal").tolist() == [2.0, 4.0]
    assert scores(games, 0, "deal").tolist() == [1.0, 0.0]
    assert scores(games, 0, "payoff").tolist() == [6.0, 0.0]  # no deal pays nothing


def test_overall_and_a_dimension_are_read_apart(played):
    game = played([1.0, 1.0])
    game.infos[0]["overall"] = 7.0
    game.infos[0]["dimensions"]["goal"] = 9.0
    assert scores([game], 0).tolist() == [7.0]
    assert scores([game], 0, "goal").tolist() == [9.0]


def test_a_cut_game_is_the_worst_of_its_batch_and_no_deal(played):
    games = [played([2.0, 2.0], deal=True, payoff=5), played([None, None]), played([4.0, 4.0])]
    assert scores(games, 0).tolist() == [2.0, 2.0, 4.0]
    assert scores(games, 0, "deal").tolist() == [1.0, 0.0, 0.0]
    assert scores(games, 0, "payoff").tolist() == [5.0, 0.0, 0.0]


def test_where_every_game_was_cut_nothing_is_worse(played):
    games = [played([None, None])] * 2
    worst = {name: low for name, (low, _) in DIMENSIONS.items()}
    assert scores(games, 0) == pytest.approx(sum(worst.values()) / 7)
    assert scores(games, 0, "secret").tolist() == [-10.0, -10.0]


def test_the_gain_is_paired_by_episode_and_the_overall_is_the_mean_over_seats(played):
    frozen = [[1.0, 5.0], [3.0, 2.0], [0.0, 4.0]]  # [episode][seat] of the all-frozen game
    first = [[2.0, 0.0], [5.0, 0.0], [3.0, 0.0]]  # trained in seat 0
    second = [[0.0, 5.0], [0.0, 1.0], [0.0, 5.0]]  # trained in seat 1
    results = {
        Pairing(cast, 3): [played(list(map(float, s))) for s in table]
        for cast, table in ((("f", "f"), frozen), (("t", "f"), first), (("f", "t"), second))
    }
    gain = advantage(results, "t", "f", "f", players=2, games=3, seed=0)
    side_0, side_1 = [1.0, 2.0, 3.0], [0.0, -1.0, 1.0]
    assert gain.keys() == {"side_0", "side_1", "overall"}
    assert gain["side_0"].value == pytest.approx(np.mean(side_0))
    assert gain["side_1"].value == pytest.approx(np.mean(side_1))
    assert gain["overall"].value == pytest.approx(np.mean([side_0, side_1]))
    assert {estimate.n for estimate in gain.values()} == {3}
    # Paired: the interval lies within the differences of single episodes.
    assert 1.0 <= gain["side_0"].ci95[0] <= gain["side_0"].ci95[1] <= 3.0
    assert gain["side_0"].unit == "points"
    deal = advantage(results, "t", "f", "f", players=2, games=3, seed=0, measure="deal")
    assert deal["overall"].unit == "rate"


def test_the_null_compares_two_samplings_of_the_same_players(played):
    once = [played([1.0, 2.0]), played([2.0, 2.0])]
    again = [played([1.5, 2.0]), played([2.5, 1.0])]
    results = {Pairing(("f", "f"), 2): once, Pairing(("f", "f"), 2, replica=1): again}
    options = {"players": 2, "games": 2, "seed": 0}
    null = advantage(results, "f", "f", "f", replicas=(1, 0), **options)
    assert (null["side_0"].value, null["side_1"].value) == (0.5, -0.5)
    same = advantage(results, "f", "f", "f", **options)
    assert all(estimate.value == 0 for estimate in same.values())


def test_three_players_have_three_sides(played):
    results = {
        Pairing(cast, 2): [played([float(k == cast.index("t")) for k in range(3)])] * 2
        for cast in (("t", "f", "f"), ("f", "t", "f"), ("f", "f", "t"))
    }
    results[Pairing(("f", "f", "f"), 2)] = [played([0.0, 0.0, 0.0])] * 2
    gain = advantage(results, "t", "f", "f", players=3, games=2, seed=0)
    assert [gain[f"side_{k}"].value for k in range(3)] == [1.0, 1.0, 1.0]
    assert gain["overall"].value == 1.0


def test_rates_count_episodes_not_turns(played):
    games = [
        played([1.0, 1.0], deal=True, payoff=4, valid=[[True, True], [True]]),
        played([1.0, 1.0], valid=[[False, True], [True]]),
        played([1.0, 1.0], valid=[[False, False], [False, False]]),
    ]
    results = {Pairing(("f", "f"), 3): games}
    standing = level(results, "f", "f", players=2, games=3, seed=0)
    assert standing["deal"].value == pytest.approx(1 / 3)
    assert standing["invalid"].value == pytest.approx(5 / 10)
    assert standing["payoff"].value == pytest.approx(4 / 3)
    # One game seen from two seats is one game.
    assert standing["deal"].n == standing["invalid"].n == standing["payoff"].n == 3
    assert [side.value for side in standing["sides"]] == [1.0, 1.0]


def test_cut_games_are_counted(played):
    games = [played([None, None]), played([1.0, 1.0]), played([1.0, 1.0]), played([1.0, 1.0])]
    results = {Pairing(("f", "f"), 4): games}
    assert level(results, "f", "f", players=2, games=4, seed=0)["cut"] == 0.25


def test_a_rate_of_none_or_all_still_has_an_interval(played):
    games = [played([1.0, 1.0], deal=True) for _ in range(10)]
    standing = level({Pairing(("f", "f"), 10): games}, "f", "f", players=2, games=10, seed=0)
    assert standing["deal"].value == 1.0 and 0.6 < standing["deal"].ci95[0] < 0.8
    assert standing["invalid"].value == 0.0 and 0.2 < standing["invalid"].ci95[1] < 0.4


class Table:
    """Stands in for `SelfPlay`: games end in an order of their own, three an `advance`."""

    def __init__(self, played, order):
        self._played, self._order = played, order

    def start(self, games):
        self.started, self.finished = list(games), []
        self._waiting = sorted(games, key=self._order)

    def advance(self):
        for game in self._waiting[:3]:
            outcome = [float(hash((game.seed, game.cast)) % 100)] * len(game.cast)
            self.finished.append(self._played(outcome, cast=game.cast, id=game.id, seed=game.seed))
        del self._waiting[:3]
        return bool(self._waiting)

    def results(self, games):
        by_id = {done.game.id: done for done in self.finished}
        return [by_id[game.id] for game in games]


@pytest.mark.parametrize("order", [lambda g: g.id, lambda g: -g.id, lambda g: g.seed % 3])
def test_results_come_in_the_order_of_seeds_however_games_end(played, order):
    pairings = [
        Pairing(("a", "b"), 4),
        Pairing(("b", "a"), 2),
        Pairing(("a", "b"), 4),  # twice: played once
        Pairing(("a", "b", "b"), 3),
        Pairing(("a", "b"), 4, replica=1),
    ]
    tables, progress = {}, []

    def table(players):
        tables[players] = Table(played, order)
        return tables[players]

    results = play_all(
        table, pairings, seed=70, first_id=9, on_progress=lambda *now: progress.append(now)
    )
    assert results.keys() == set(pairings)
    for pairing, games in results.items():
        assert [game.game.seed for game in games] == list(range(70, 70 + pairing.games))
        assert all(game.game.cast == pairing.cast for game in games)
        assert [g.infos[0]["overall"] for g in games] == [
            float(hash((70 + i, pairing.cast)) % 100) for i in range(pairing.games)
        ]
    ids = [game.id for t in tables.values() for game in t.started]
    assert sorted(ids) == list(range(9, 9 + 13))
    assert tables.keys() == {2, 3}
    # Episode by episode, so that the engines of all policies are busy at once.
    assert [game.seed for game in tables[2].started][:3] == [70, 70, 70]
    assert all(total == 13 for _, total in progress)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
