"""Games on engines: who hears what, what is recorded, and that nothing depends on the schedule."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.data.conversation import Message
from jaxconv.errors import Refused
from jaxconv.models.decode import unstack
from jaxconv.rollout.engine import Engine, EngineShape
from jaxconv.rollout.selfplay import Game, SelfPlay

SHAPE = EngineShape(
    slots=4, lengths=(160,), burst=4, leave=0.5, prefill_rows=(4,), prefill_tokens=(8, 32)
)


@pytest.fixture
def make_selfplay(config, weights, template, make_counter):
    def make(make_env, *, lanes=2, shape=SHAPE, policies=None, concurrent=8, turn_budget=6):
        def engine(its_weights):
            engine = Engine(config, shape, stop_ids=[template.end], key=jax.random.key(3))
            engine.weights = its_weights
            return engine

        policies = policies or {"model": weights}
        return SelfPlay(
            make_env,
            make_counter,
            template,
            {name: [engine(w) for _ in range(lanes)] for name, w in policies.items()},
            turn_budget=turn_budget,
            concurrent=concurrent,
        )

    return make


def games(n, cast=("model",)) -> list[Game]:
    return [Game(id=10 + i, seed=i, cast=cast) for i in range(n)]


def plain(played) -> list[dict]:
    """Everything but the recorded numbers, which may differ in the last digits."""
    out = [dataclasses.asdict(p) for p in played]
    for game in out:
        for stream in game["streams"]:
            del stream["logprob"], stream["value"]
    return out


def numbers(played) -> np.ndarray:
    return np.array([x for p in played for s in p.streams for x in s.logprob + s.value])


WORLDS = ("in turn", "three in turn", "together")


@pytest.fixture
def worlds(talk):
    return {
        "in turn": lambda: talk(2, 3),
        "three in turn": lambda: talk(3, 2),
        "together": lambda: talk(3, 2, together=True),
    }


@pytest.mark.parametrize("world", WORLDS)
def test_streams_hold_exactly_what_each_agent_read_and_said(make_selfplay, template, world, worlds):
    for played in make_selfplay(worlds[world]).play(games(6)):
        n, rounds = len(played.agents), len(played.texts[0])
        assert len(played.transcript) == n * rounds
        lines = iter(played.transcript)
        heard = [[Message("system", brief)] for brief in played.brief]
        expected = [[] for _ in range(n)]
        turns = [0] * n
        owns = [
            [
                [t for t, turn in zip(s.tokens, s.turn, strict=True) if turn == i]
                for i in range(rounds)
            ]
            for s in played.streams
        ]
        order = [seat for seat, _ in played.transcript]
        together = world == "together"
        batches = (
            [order[i : i + n] for i in range(0, len(order), n)]
            if together
            else [[seat] for seat in order]
        )
        for batch in batches:
            said = []
            for seat in batch:
                said.append(next(lines))
                if turns[seat]:
                    cut = owns[seat][turns[seat] - 1][-1] != template.end
                    expected[seat] += [template.end] * cut + list(template.after_end)
                expected[seat] += template.render(heard[seat]) + list(template.reply)
                heard[seat] = []
                own = owns[seat][turns[seat]]
                expected[seat] += own
                assert template.decode(own) == said[-1][1] == played.texts[seat][turns[seat]]
                turns[seat] += 1
            for seat in range(n):
                heard[seat] += [
                    Message("user", text, played.agents[s]) for s, text in said if s != seat
                ]
        assert [s.tokens for s in played.streams] == expected
        for stream in played.streams:
            lengths = {len(x) for x in (stream.tokens, stream.turn, stream.logprob, stream.value)}
            assert lengths == {len(stream.tokens)}
            assert stream.turns == rounds


@pytest.mark.parametrize("world", WORLDS)
def test_rewards_belong_to_the_turns_that_earned_them(make_selfplay, world, worlds):
    for played in make_selfplay(worlds[world]).play(games(4)):
        for seat, texts in enumerate(played.texts):
            words = [float(len(text.split())) for text in texts]
            assert played.turn_rewards[seat] == [*words[:-1], words[-1] + 100]
            assert played.rewards[seat] == sum(words) + 100
            assert played.valid[seat] == [bool(text) for text in texts]
        assert not played.truncated


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("change", [{"lanes": 1}, {"lanes": 3}, {"concurrent": 1}], ids=str)
def test_the_schedule_changes_nothing(make_selfplay, world, change, worlds):
    expected = make_selfplay(worlds[world]).play(games(7))
    played = make_selfplay(worlds[world], **change).play(games(7))
    assert plain(played) == plain(expected)
    np.testing.assert_allclose(numbers(played), numbers(expected), atol=1e-4)


def test_games_come_back_in_the_order_asked_for(make_selfplay, worlds):
    asked = games(9)[::-1]
    assert [p.game for p in make_selfplay(worlds["in turn"]).play(asked)] == asked


def test_scripts_and_policies_share_a_game(make_selfplay, worlds):
    played = make_selfplay(worlds["three in turn"]).play(games(4, ("count", "model", "tally")))
    for game in played:
        assert game.streams[0].tokens == game.streams[2].tokens == []
        assert game.streams[1].turns == 2
        # A counter has heard its brief and everybody's words since.
        before = [seat for seat, _ in game.transcript]
        for seat, name in ((0, "count"), (2, "tally")):
            places = [i for i, s in enumerate(before) if s == seat]
            heard = [1 + sum(s != seat for s in before[:i]) for i in places]
            assert game.texts[seat] == [f"{name} {n}" for n in heard]


def test_games_among_scripts_alone_need_no_engine(make_selfplay, worlds):
    (game,) = make_selfplay(worlds["in turn"], policies=None).play(games(1, ("count", "tally")))
    assert [text for _, text in game.transcript] == [
        "count 1", "tally 2", "count 2", "tally 3", "count 3", "tally 4",
    ]  # fmt: skip


def test_the_last_of_a_cast_plays_all_further_seats():
    game = Game(0, 0, ("a", "b"))
    assert [game.player(seat) for seat in range(4)] == ["a", "b", "b", "b"]


def test_each_policy_speaks_with_its_own_weights(make_selfplay, make_model, weights, worlds):
    other = unstack(make_model(1))
    mixed = make_selfplay(
        worlds["in turn"], policies={"model": weights, "other": other}, lanes=1
    ).play(games(4, ("model", "other")))
    for name, its_weights, seat in (("model", weights, 0), ("other", other, 1)):
        # Its words in reply to the same words heard are those of self-play, as far as that goes.
        own = make_selfplay(worlds["in turn"], policies={name: its_weights}, lanes=1)
        own = own.play(games(4, (name,)))
        openers = [i for i, game in enumerate(mixed) if game.transcript[0][0] == seat]
        assert openers
        for i in openers:
            assert mixed[i].transcript[0] == own[i].transcript[0]
    assert plain(mixed) != plain(make_selfplay(worlds["in turn"]).play(games(4, ("model",))))


def test_a_game_is_cut_when_a_stream_is_full(make_selfplay, template, talk):
    """The outcome is unknown: no final reward; records stay in lockstep, slots are free again."""
    shape = dataclasses.replace(SHAPE, lengths=(48,))
    selfplay = make_selfplay(lambda: talk(2, 40, together=True), shape=shape, turn_budget=20)
    played = selfplay.play(games(8))
    assert all(game.truncated for game in played)
    for game in played:
        for seat, stream in enumerate(game.streams):
            assert len(stream.tokens) <= 48
            n = stream.turns
            assert len(game.texts[seat]) == len(game.valid[seat]) == n
            assert len(game.turn_rewards[seat]) == n
            assert game.rewards[seat] < 100
    assert any(not valid for game in played for seat in game.valid for valid in seat)


@pytest.mark.parametrize("world", ["together", "in turn"])
@pytest.mark.parametrize("lengths", [(48,), (160,)])
def test_a_snapshot_at_any_moment_continues_bit_for_bit(make_selfplay, world, lengths, worlds):
    """Through JSON and numpy, at every step, speakers cut off by the cache's end included."""
    shape = dataclasses.replace(SHAPE, lengths=lengths)
    cast = ("model", "count", "model")

    def fresh():
        return make_selfplay(worlds[world], shape=shape, lanes=2)

    selfplay = fresh()
    asked = [*games(5, cast), Game(99, 7, ("model",))]
    selfplay.start(asked)
    snapshots = []
    while True:
        arrays, host = selfplay.snapshot()
        snapshots.append((jax.tree.map(np.array, arrays), json.dumps(host)))
        if not selfplay.advance():
            break
    expected = [dataclasses.asdict(p) for p in selfplay.results(asked)]
    assert any(game["truncated"] for game in expected) == (lengths == (48,))
    assert len(snapshots) > 10
    for arrays, text in snapshots:
        host = json.loads(text)
        again = fresh()
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), again.like(host))
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), arrays)
        again.restore(arrays, host)
        while again.advance():
            pass
        assert [dataclasses.asdict(p) for p in again.results(asked)] == expected


def test_one_burst_is_in_flight(make_selfplay, worlds):
    """The next burst starts before the last is read."""
    selfplay = make_selfplay(worlds["in turn"], lanes=2)
    selfplay.start(games(6))
    most, flying = 0, []
    while selfplay.advance():
        flying.append(len(selfplay._flying))
        most = max(most, flying[-1])
    assert most == 1
    assert flying.count(1) > len(flying) / 2


def test_starting_again_forgets_what_was_under_way(make_selfplay, worlds):
    selfplay = make_selfplay(worlds["in turn"])
    expected = plain(selfplay.play(games(3)))
    selfplay.start(games(6))
    for _ in range(4):
        selfplay.advance()
    assert plain(selfplay.play(games(3))) == expected


def test_a_game_that_can_never_be_seated_is_refused(make_selfplay, worlds):
    shape = dataclasses.replace(SHAPE, slots=2)
    with pytest.raises(Refused, match=r"3 agents needs 3 slots.*slots are 2"):
        make_selfplay(worlds["three in turn"], shape=shape, lanes=1).play(games(1))


def test_an_environment_may_cut_a_game_and_judge_no_turn(make_selfplay, talk):
    class Mute(talk):
        def step(self, actions):
            return dataclasses.replace(super().step(actions), infos={}, truncated=True, to_act=())

    (game,) = make_selfplay(lambda: Mute(2, 3, together=True)).play(games(1))
    assert game.truncated
    assert len(game.transcript) == 2
    assert game.valid == [[True], [True]]


def test_the_records_are_those_of_the_trainer(make_selfplay, model, template, worlds):
    """Log-prob and value at every token of every turn, cuts and later turns included."""
    from jaxconv.data.packing import first_fit, pack_tokens
    from jaxconv.train.actor_critic import evaluate_tokens

    played = make_selfplay(worlds["together"]).play(games(4))
    streams = [s for game in played for s in game.streams]
    packing = first_fit([len(s.tokens) for s in streams], 160)
    batch = pack_tokens(
        packing, [s.tokens for s in streams], [np.array(s.turn) >= 0 for s in streams]
    )
    logprob, _, value = evaluate_tokens(model, jax.tree.map(jnp.asarray, batch))
    gathered = zip(packing.gather(logprob), packing.gather(value), strict=True)
    for stream, (p, v) in zip(streams, gathered, strict=True):
        own = np.flatnonzero(np.array(stream.turn) >= 0)
        np.testing.assert_allclose(np.array(stream.logprob)[own], p[own - 1], atol=1e-4)
        np.testing.assert_allclose(np.array(stream.value)[own], v[own - 1], atol=1e-4)
        read = np.array(stream.turn) < 0
        assert not np.array(stream.logprob)[read].any()
