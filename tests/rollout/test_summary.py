"""The numbers that are logged of a batch of games, by hand."""

import pytest

from jaxconv.rollout.selfplay import Game, Played
from jaxconv.rollout.stream import Stream
from jaxconv.rollout.summary import summarise


def game(cast, rewards, texts, valid, *, infos=None, spoken=(), teams=("all", "all"), cut=False):
    """Seats' rewards, words and their validity; every turn of the policy had two tokens."""
    streams = []
    for seat, words in enumerate(texts):
        stream = Stream()
        if cast[seat] == "policy":
            for _ in words:
                stream.hear([1, 2, 3])
                stream.say([4, 5], [-1.0, -1.0], [0.0, 0.0])
        streams.append(stream)
    return Played(
        game=Game(0, 0, cast),
        agents=("Ann", "Bob"),
        teams=teams,
        streams=streams,
        turn_rewards=[[0.0] * len(words) for words in texts],
        texts=texts,
        valid=valid,
        rewards=rewards,
        infos=infos or [{}, {}],
        transcript=list(spoken),
        brief=["", ""],
        truncated=cut,
    )


def measured(overall, goal, end):
    return {"dimensions": {"goal": goal}, "overall": overall, "end": end}


GAMES = [
    game(
        ("policy", "policy"),
        [1.0, 3.0],
        [["a b c", "a b"], ["a b c"]],
        [[True, False], [True]],
        infos=[measured(2.0, 8.0, "deal"), measured(4.0, 6.0, "deal")],
        spoken=[(0, "a b c"), (1, "a b c"), (0, "a b")],
        teams=("red", "blue"),
    ),
    game(
        ("policy", "script"),
        [5.0, 100.0],
        [["x y"], ["script words", "more"]],
        [[True], [False, False]],
        infos=[measured(6.0, 1.0, "limit"), measured(99.0, 99.0, "limit")],
        spoken=[(0, "x y")],
        teams=("red", "blue"),
    ),
]


def test_only_the_seats_of_the_policy_count():
    found = summarise(GAMES, "policy")
    assert found["reward/mean"] == 3.0
    assert found["reward/std"] == pytest.approx((8 / 3) ** 0.5)
    assert (found["reward/seat_0"], found["reward/seat_1"]) == (3.0, 3.0)
    assert (found["reward/team_red"], found["reward/team_blue"]) == (3.0, 3.0)
    assert found["score/mean"] == 4.0 and found["dimension/goal"] == 5.0
    assert found["turn/invalid"] == pytest.approx(1 / 4)
    assert found["turn/tokens"] == 2.0
    assert found["turn/per_agent"] == pytest.approx(4 / 3)


def test_games_are_counted_whole():
    found = summarise(GAMES, "policy")
    assert found["game/turns"] == 2.0 and found["game/truncated"] == 0.0
    assert (found["end/deal"], found["end/limit"]) == (0.5, 0.5)


def test_diversity_counts_different_bigrams_and_turns():
    found = summarise(GAMES, "policy")
    # Bigrams: a b, b c | a b | a b, b c | x y: 3 different of 6. Turns: 3 different of 4.
    assert found["diversity/distinct_2"] == pytest.approx(3 / 6)
    assert found["diversity/distinct_turns"] == pytest.approx(3 / 4)


def test_cut_games_have_no_score():
    cut = game(("policy", "policy"), [0.0, 0.0], [[], []], [[], []], cut=True)
    found = summarise([cut], "policy")
    assert "score/mean" not in found and found["game/truncated"] == 1.0
    assert found["end/cut"] == 1.0 and found["turn/invalid"] == 0.0 and found["turn/tokens"] == 0.0
    both = summarise([cut, GAMES[0]], "policy")
    assert both["score/mean"] == 3.0 and both["end/cut"] == 0.5
