"""The slot engine: a stream's text and records do not depend on anything but the stream."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.errors import Refused
from jaxconv.models.decode import unstack
from jaxconv.rollout.burst import decode_burst
from jaxconv.rollout.engine import Engine, EngineShape, Sampling

STOPS = tuple(range(0, 280, 20))  # so that turns end at many lengths
NEVER = tuple(range(280, 294))  # outside the vocabulary, as many as STOPS
SHAPE = EngineShape(
    slots=4, lengths=(48, 96), burst=8, leave=0.5, prefill_rows=(2, 4), prefill_tokens=(4, 8)
)


@pytest.fixture
def make_engine(config, weights):
    def make(shape=SHAPE, *, stop_ids=STOPS, sampling=None, seed=0) -> Engine:
        engine = Engine(
            config, shape, stop_ids=stop_ids, key=jax.random.key(seed), sampling=sampling
        )
        engine.weights = weights
        return engine

    return make


def heard_by(stream: int, turns: int = 3) -> list[list[int]]:
    """What stream number `stream` hears before each of its turns: 1 to 19 tokens."""
    rng = np.random.default_rng(stream)
    return [rng.integers(2, 280, rng.integers(1, 20)).tolist() for _ in range(turns)]


def converse(engine: Engine, streams, budget: int = 10, ahead: bool = True) -> dict:
    """Plays every stream of `streams` (id -> heard pieces) to its end; id -> its turns.

    Slots are refilled in the order of `streams`; one burst is kept in flight when `ahead`.
    """
    waiting = list(streams)
    owner: dict[int, int] = {}
    said: dict[int, list] = {stream: [] for stream in streams}

    def go_on(slot):
        pieces, turns = streams[owner[slot]], said[owner[slot]]
        if len(turns) == len(pieces) or len(pieces[len(turns)]) > engine.room(slot):
            engine.close(slot)
            del owner[slot]
        else:
            engine.say(slot, pieces[len(turns)], budget)

    while waiting or owner:
        while waiting and engine.free:
            stream = waiting.pop(0)
            slot = engine.open(stream)
            owner[slot] = stream
            go_on(slot)
        if engine.speaking:
            engine.dispatch()
        if engine.flying > ahead or not engine.speaking:
            for turn in engine.collect():
                said[owner[turn.slot]].append(turn)
                go_on(turn.slot)
    return said


def texts(said) -> dict:
    return {stream: [(t.tokens, t.end) for t in turns] for stream, turns in said.items()}


def records(said) -> np.ndarray:
    turns = [turn for stream in sorted(said) for turn in said[stream]]
    return np.array([x for turn in turns for x in turn.logprobs + turn.values])


@pytest.fixture(scope="module")
def alone(config, weights):
    """Eight conversations, one after the other, each alone in the engine's last slot."""
    engine = Engine(config, SHAPE, stop_ids=STOPS, key=jax.random.key(0))
    engine.weights = weights
    said = {}
    for stream in range(8):
        engine.reset()
        others = [engine.open(1000 + i) for i in range(SHAPE.slots - 1)]
        said |= converse(engine, {stream: heard_by(stream)}, ahead=False)
        assert engine.free == SHAPE.slots - len(others)
    return said


def test_turns_end_in_different_ways(alone):
    turns = [turn for said in alone.values() for turn in said]
    assert len(turns) == 24
    assert {turn.end for turn in turns} == {"stop", "budget"}
    for turn in turns:
        assert len(turn.tokens) == len(turn.logprobs) == len(turn.values)
        assert all(token not in STOPS for token in turn.tokens[:-1])
        assert (turn.end == "stop") == (turn.tokens[-1] in STOPS)
        assert turn.end == "stop" or len(turn.tokens) == 10
    assert len({tuple(turn.tokens) for turn in turns}) == 24


def test_text_is_the_same_in_a_batch_of_64(make_engine, alone):
    shape = dataclasses.replace(SHAPE, slots=64, prefill_rows=(16, 64))
    together = converse(make_engine(shape), {s: heard_by(s) for s in range(64)})
    together = {stream: together[stream] for stream in alone}
    assert texts(together) == texts(alone)
    np.testing.assert_allclose(records(together), records(alone), atol=1e-4)


@pytest.mark.parametrize("order", [range(11), [9, 3, 10, 7, 1, 0, 8, 2, 6, 5, 4]])
def test_text_is_the_same_in_refilled_slots(make_engine, alone, order):
    """Four slots take eleven conversations, each in whatever slot is free."""
    said = converse(make_engine(), {stream: heard_by(stream) for stream in order})
    said = {stream: said[stream] for stream in alone}
    assert texts(said) == texts(alone)
    np.testing.assert_allclose(records(said), records(alone), atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": (96,)},
        {"burst": 1},
        {"leave": 1.0},
        {"prefill_tokens": (3,), "prefill_rows": (1, 2)},
    ],
    ids=str,
)
def test_text_does_not_depend_on_the_sizes_of_the_engine(make_engine, alone, change):
    """Growing caches, bursts of one token, pieces of three tokens: all the same text."""
    shape = dataclasses.replace(SHAPE, **change)
    said = converse(make_engine(shape), {stream: heard_by(stream) for stream in alone})
    assert texts(said) == texts(alone)


def test_streams_with_the_same_words_differ_and_depend_on_the_run_key(make_engine):
    same = {stream: [[5, 6, 7]] for stream in range(4)}
    said = converse(make_engine(), same)
    assert len({tuple(turns[0].tokens) for turns in said.values()}) == 4
    assert texts(converse(make_engine(seed=1), same)) != texts(said)


def test_a_burst_leaves_early_and_keeps_the_turns_under_way(make_engine):
    engine = make_engine(dataclasses.replace(SHAPE, leave=0.25), stop_ids=NEVER)
    budgets = (2, 20, 20, 20)
    slots = [engine.open(stream) for stream in range(4)]
    for slot, budget in zip(slots, budgets, strict=True):
        engine.say(slot, [7, 8], budget)
    engine.dispatch()
    (first,) = engine.collect()
    assert (first.slot, len(first.tokens)) == (slots[0], 2)
    assert engine.steps == engine.sampled == 8
    engine.dispatch()
    assert engine.collect() == []
    assert engine.sampled == 8 + 3 * 8


FILTERS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
]


def processed_logprob(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Log-probs [T, V] of the distribution that is sampled, by sorting, in float64."""
    out = np.full(logits.shape, -np.inf)
    for row, z in enumerate(logits.astype(np.float64) / sampling.temperature):
        order = np.argsort(-z, kind="stable")
        keep = order[: sampling.top_k or len(order)]
        p = np.exp(z[keep] - z[keep].max())
        p /= p.sum()
        keep = keep[np.cumsum(p) - p < sampling.top_p] if sampling.top_p < 1 else keep
        keep = keep[z[keep] >= z.max() + np.log(sampling.min_p)] if sampling.min_p else keep
        out[row, keep] = z[keep] - np.log(np.exp(z[keep]).sum())
    return out


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_records_equal_a_full_forward_pass(make_engine, model, sampling):
    said = converse(make_engine(sampling=sampling), {s: heard_by(s) for s in range(4)})
    compared = 0
    for stream, turns in said.items():
        ids, own = [], []
        for piece, turn in zip(heard_by(stream), turns, strict=True):
            ids += piece + turn.tokens
            own += [False] * len(piece) + [True] * len(turn.tokens)
        at = np.flatnonzero(own) - 1
        padded = jnp.asarray([ids + [0] * (96 - len(ids))])
        hidden = model.decoder(padded)[0]
        expected = processed_logprob(np.asarray(model.decoder.logits(hidden))[at], sampling)
        expected = expected[np.arange(len(at)), np.array(ids)[at + 1]]
        logprobs = np.concatenate([turn.logprobs for turn in turns])
        values = np.concatenate([turn.values for turn in turns])
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(values, model.value_head(hidden)[at], atol=1e-4)
        compared += len(at)
    assert compared > 40


def test_greedy_takes_the_likeliest_token_and_records_certainty(make_engine, model):
    said = converse(make_engine(sampling=Sampling(temperature=0.0)), {0: [[5, 6, 7]]})
    (turn,) = said[0]
    hidden = model.decoder(jnp.asarray([[5, 6, 7, *turn.tokens]]))[0]
    likeliest = np.argmax(model.decoder.logits(hidden), -1)[2:-1]
    assert likeliest.tolist() == turn.tokens
    assert turn.logprobs == [0.0] * len(turn.tokens)


def test_a_burst_works_in_place(make_engine):
    """Temporary memory under 0.3 of the cache, and the cache is updated where it lies."""
    shape = dataclasses.replace(SHAPE, slots=64, lengths=(128,))
    engine = make_engine(shape)
    cache = sum(x.nbytes for x in jax.tree.leaves(engine._state.cache))
    compiled = decode_burst.lower(
        engine.weights,
        engine._state,
        np.zeros(4, np.float32),
        engine._stop_ids,
        np.float32(0.5),
        config=engine.config,
        burst=8,
    ).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * cache
    assert memory.alias_size_in_bytes >= cache


@pytest.mark.parametrize("heard", [90, 93, 94, 95])
def test_a_stream_ends_where_its_cache_does(make_engine, heard):
    engine = make_engine(stop_ids=NEVER)
    slot = engine.open(0)
    engine.say(slot, list(range(2, 2 + heard)), 50)
    turns = []
    while not turns:
        engine.dispatch()
        turns = engine.collect()
    (turn,) = turns
    assert turn.end == "cache"
    assert heard + len(turn.tokens) == 96
    assert engine.room(slot) < 1
    with pytest.raises(ValueError, match="room"):
        engine.say(slot, [2], 5)
    engine.close(slot)
    assert engine.free == SHAPE.slots


def test_neighbours_of_a_full_stream_go_on(make_engine):
    engine = make_engine(stop_ids=NEVER)
    alone = converse(engine, {3: heard_by(3, turns=1)})[3]
    engine.reset()
    full = engine.open(99)
    engine.say(full, list(range(2, 92)), 50)
    said = {}
    slot = engine.open(3)
    engine.say(slot, heard_by(3)[0], 10)
    while len(said) < 2:
        engine.dispatch()
        said |= {turn.slot: turn for turn in engine.collect()}
    assert said[full].end == "cache"
    assert 90 + len(said[full].tokens) == 96
    assert said[slot].tokens == alone[0].tokens and said[slot].end == "budget"


def test_what_does_not_fit_is_refused_and_changes_nothing(make_engine, alone):
    engine = make_engine()
    slot = engine.open(3)
    with pytest.raises(ValueError, match=r"slot .*: 96 tokens for room 95"):
        engine.say(slot, [2] * 96, 10)
    with pytest.raises(ValueError, match="0 tokens"):
        engine.say(slot, [], 10)
    engine.say(slot, heard_by(3)[0], 10)
    with pytest.raises(ValueError, match="speaking already"):
        engine.say(slot, [2], 10)
    turns = []
    while not turns:
        engine.dispatch()
        turns = engine.collect()
    assert turns[0].tokens == alone[3][0].tokens


def test_a_stream_that_closes_while_it_speaks_is_freed_unseen(make_engine, alone):
    engine = make_engine(stop_ids=NEVER)
    closing, staying = engine.open(7), engine.open(8)
    engine.say(closing, [3, 4], 30)
    engine.say(staying, [3, 4], 3)
    engine.dispatch()
    engine.close(closing)
    assert engine.free == 2
    seen = engine.collect()
    while engine.speaking:
        engine.dispatch()
        seen += engine.collect()
    assert [turn.slot for turn in seen] == [staying]
    assert engine.free == 3
    said = converse(engine, {3: heard_by(3)[:1]})
    assert said[3][0].tokens[:2] == alone[3][0].tokens[:2]  # its slot is as good as new


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("slots", 0, "at least 1"),
        ("burst", 0, "at least 1"),
        ("leave", 0.0, "above 0 and at most 1"),
        ("leave", 1.01, "above 0 and at most 1"),
        ("leave", float("nan"), "above 0 and at most 1"),
        *(
            (field, value, "sizes of at least 1 that ascend")
            for field in ("lengths", "prefill_rows", "prefill_tokens")
            for value in ((64, 32), (32, 32), (0, 32), (-1,), ())
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(field, value, expected):
    with pytest.raises(Refused) as refused:
        dataclasses.replace(SHAPE, **{field: value})
    assert str(refused.value) == f"rollout.{field}={value}; it must be {expected}"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
    ],
)
def test_distributions_that_cannot_be_are_refused(field, value, expected):
    with pytest.raises(Refused) as refused:
        Sampling(**{field: value})
    assert str(refused.value) == f"rollout.{field}={value}; it must be {expected}"


def test_the_limits_of_what_may_be_are_in_it():
    Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=1.0)
    EngineShape(slots=1, burst=1, lengths=(1,), leave=1.0, prefill_rows=(1,), prefill_tokens=(1,))


def test_the_cache_may_not_outgrow_the_positions_of_the_model(make_engine):
    with pytest.raises(Refused, match=r"rollout.lengths=\(161,\); the last may be 160 at most"):
        make_engine(dataclasses.replace(SHAPE, lengths=(161,)))
    make_engine(dataclasses.replace(SHAPE, lengths=(160,)))


def test_a_snapshot_continues_bit_for_bit_in_the_middle_of_turns(make_engine):
    def start(engine):
        for stream in range(3):
            engine.say(engine.open(stream), heard_by(stream)[0], 30)
        engine.dispatch()

    def finish(engine):
        turns = []
        while engine.speaking or engine.flying:
            if engine.speaking:
                engine.dispatch()
            turns += engine.collect()
        return turns, engine.steps, engine.sampled, engine.free

    undisturbed = make_engine(stop_ids=NEVER)
    start(undisturbed)
    arrays, host = undisturbed.snapshot()
    arrays, host = jax.tree.map(np.array, arrays), json.loads(json.dumps(host))
    restored = make_engine(stop_ids=NEVER)
    like = restored.like(host)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), like) == jax.tree.map(
        lambda x: (x.shape, x.dtype), arrays
    )
    restored.restore(arrays, host)
    assert finish(restored) == finish(undisturbed)


def test_new_weights_are_used_at_the_next_dispatch(make_engine, make_model, alone):
    engine = make_engine()
    engine.weights = unstack(make_model(1))
    said = converse(engine, {0: heard_by(0)})
    assert texts(said)[0] != texts(alone)[0]
    engine.reset()
    engine.weights = unstack(make_model(0))
    assert texts(converse(engine, {0: heard_by(0)}))[0] == texts(alone)[0]
