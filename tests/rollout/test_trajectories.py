"""What training reads of finished conversations: whose row is where, and what stands in it."""

import numpy as np
import pytest

from jaxconv.errors import Failed, Refused
from jaxconv.rollout.selfplay import MAX_AGENTS, Game, Played, SelfPlay
from jaxconv.rollout.stream import Stream
from jaxconv.rollout.trajectories import to_trajectories

TEAMS = ("buyers", "sellers")


def spoken(first: int, *pieces: tuple[int, int]) -> Stream:
    """A stream of (tokens heard, tokens said) pieces; tokens count up from `first`."""
    stream, token = Stream(), first
    for heard, said in pieces:
        stream.hear(list(range(token, token + heard)))
        own = list(range(token + heard, token + heard + said))
        stream.say(own, [-t / 100 for t in own], [t / 10 for t in own])
        token += heard + said
    return stream


def played(game: int, streams, turn_rewards, *, teams=TEAMS, truncated=False) -> Played:
    n = len(streams)
    return Played(
        game=Game(game, seed=game, cast=("model",)),
        agents=tuple(f"agent{i}" for i in range(n)),
        teams=teams,
        streams=streams,
        turn_rewards=turn_rewards,
        texts=[[""] * len(r) for r in turn_rewards],
        valid=[[True] * len(r) for r in turn_rewards],
        rewards=[sum(r) for r in turn_rewards],
        infos=[{}] * n,
        transcript=[],
        brief=[""] * n,
        truncated=truncated,
    )


@pytest.fixture
def games():
    """Three games: two models; a model and a script; one that was cut, teams the other way."""
    return [
        played(
            7,
            [spoken(100, (3, 2), (1, 2)), spoken(200, (2, 1))],
            [[0.5, 1.5], [0.25]],
        ),
        played(3, [Stream(), spoken(300, (1, 1), (1, 1), (1, 1))], [[9.0, 9.0], [1.0, 2.0, 3.0]]),
        played(
            5,
            [spoken(400, (4, 3)), spoken(500, (1, 2))],
            [[-1.0], [-2.0]],
            teams=TEAMS[::-1],
            truncated=True,
        ),
    ]


@pytest.fixture
def keep():
    return [[[True, False], [True]], [[False, False], [True, True, False]], [[False], [True]]]


@pytest.fixture
def collected(games, keep):
    return to_trajectories(games, keep, TEAMS, pad_streams=4, pad_tokens=8, pad_turns=2)


def test_rows_are_in_the_order_of_games_and_seats_without_scripts(collected):
    assert [row[0] for row in collected.tokens] == [100, 200, 300, 400, 500]
    assert collected.team[:5].tolist() == [0, 1, 1, 1, 0]
    assert collected.truncated[:5].tolist() == [False, False, False, True, True]


def test_axes_are_padded_to_multiples(collected, games, keep):
    assert collected.turn_ids.shape == collected.logprob.shape == collected.value.shape == (8, 8)
    assert collected.turn_rewards.shape == collected.keep_turns.shape == (8, 4)
    exact = to_trajectories(games, keep, TEAMS, pad_streams=5, pad_tokens=4, pad_turns=3)
    assert exact.turn_ids.shape == (5, 8) and exact.turn_rewards.shape == (5, 3)


def test_padding_belongs_to_no_turn_and_earns_nothing(collected):
    for row in range(8):
        size = len(collected.tokens[row]) if row < 5 else 0
        assert (collected.turn_ids[row, size:] == -1).all()
        assert not collected.logprob[row, size:].any() and not collected.value[row, size:].any()
        turns = collected.turn_ids[row].max() + 1
        assert not collected.turn_rewards[row, turns:].any()
        assert collected.keep_turns[row, turns:].all()
    assert not collected.team[5:].any() and not collected.truncated[5:].any()


def test_every_token_has_its_turn_and_its_numbers(collected):
    assert collected.tokens[0] == list(range(100, 108))
    assert collected.turn_ids[0].tolist() == [-1, -1, -1, 0, 0, -1, 1, 1]
    assert collected.turn_ids[2].tolist() == [-1, 0, -1, 1, -1, 2, -1, -1]
    for row, tokens in enumerate(collected.tokens):
        at = np.array(tokens, np.float32)
        own = collected.turn_ids[row, : len(at)] >= 0
        np.testing.assert_allclose(collected.logprob[row, : len(at)], np.where(own, -at / 100, 0))
        np.testing.assert_allclose(collected.value[row, : len(at)], np.where(own, at / 10, 0))


def test_rewards_and_verdicts_stand_at_the_turn_they_are_about(collected):
    assert collected.turn_rewards[:5].tolist() == [
        [0.5, 1.5, 0, 0],
        [0.25, 0, 0, 0],
        [1, 2, 3, 0],
        [-1, 0, 0, 0],
        [-2, 0, 0, 0],
    ]
    assert collected.keep_turns[:5].tolist() == [
        [True, False, True, True],
        [True, True, True, True],
        [True, True, False, True],
        [False, True, True, True],
        [True, True, True, True],
    ]


def test_games_in_which_nobody_spoke_are_a_failure():
    silent = played(0, [Stream(), Stream()], [[1.0], []], truncated=True)
    with pytest.raises(Failed, match="nobody spoke in 1 games"):
        to_trajectories([silent], [[[True], []]], TEAMS, pad_streams=1, pad_tokens=1, pad_turns=1)


def test_streams_of_a_game_have_ids_for_so_many_agents_and_no_more(talk, make_counter, template):
    def play(agents: int) -> list[Played]:
        table = SelfPlay(
            lambda: talk(agents, 1), make_counter, template, {}, turn_budget=4, concurrent=1
        )
        return table.play([Game(0, 0, ("script",))])

    assert len(play(MAX_AGENTS)[0].transcript) == MAX_AGENTS
    with pytest.raises(Refused, match="a game has 17 agents; it may have 16"):
        play(MAX_AGENTS + 1)
