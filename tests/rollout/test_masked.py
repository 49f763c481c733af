"""Steps of one token: with nothing forbidden they are bursts; what is forbidden is never said; a
prefix that is read once says the same as one that is read each time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import pack_mask

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.rollout.engine import Engine, EngineShape, Sampling, Turn

VOCAB = 280
STOPS = tuple(range(0, VOCAB, 20))
SHAPE = EngineShape(
    slots=4, lengths=(48, 96), burst=8, leave=0.5, prefill_rows=(4,), prefill_tokens=(8,)
)


def packed(masks) -> np.ndarray:
    return np.asarray(pack_mask(jnp.asarray(masks)))


ON_AND_ON = np.ones((SHAPE.slots, VOCAB), bool)
ON_AND_ON[:, STOPS] = False
ALL, NO_END = packed(np.ones_like(ON_AND_ON)), packed(ON_AND_ON)


@pytest.fixture(scope="module")
def make_model(random_decoder):
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        embed_dim=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=96,
    )

    def make(seed: int) -> ActorCritic:
        head = ValueHead(config.embed_dim, 0.25)
        head.kernel[...] = np.random.default_rng(seed).normal(size=head.kernel.shape)
        return ActorCritic(random_decoder(config, seed), head)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(0)


@pytest.fixture(scope="module")
def weights(model):
    return unstack(model)


@pytest.fixture
def make_engine(model, weights):
    def make(sampling=None) -> Engine:
        config, key = model.decoder.config, jax.random.key(0)
        engine = Engine(config, SHAPE, stop_ids=STOPS, key=key, sampling=sampling)
        engine.weights = weights
        return engine

    return make


def words(stream: int, count: int) -> list[int]:
    return np.random.default_rng(stream).integers(2, VOCAB, count).tolist()


def by_bursts(engine: Engine) -> list[Turn]:
    engine.dispatch()
    return engine.collect()


def by_steps(engine: Engine, allowed=ALL, sampling=None) -> list[Turn]:
    engine.read()
    engine.choose(allowed, sampling or {})
    return engine.collect()


def to_the_end(engine: Engine) -> list[Turn]:
    """Turns that no stop ends."""
    turns = []
    while engine.speaking:
        turns += by_steps(engine, NO_END)
    return turns


def play(engine: Engine, go_on, turns: int = 2) -> dict[int, list[Turn]]:
    """Four streams of two turns each; stream -> its turns."""
    slots = {engine.open(stream): stream for stream in range(4)}
    said: dict[int, list[Turn]] = {stream: [] for stream in slots.values()}
    for slot, stream in slots.items():
        engine.say(slot, words(stream, 5 + 4 * stream), 9)
    while engine.speaking:
        for turn in go_on(engine):
            of = said[slots[turn.slot]]
            of.append(turn)
            if len(of) < turns:
                engine.say(turn.slot, words(10 + turn.slot, 6), 9)
    return said


def assert_same(found, expected, atol=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.end) == (other.tokens, other.end)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)
        np.testing.assert_allclose(one.values, other.values, atol=atol)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.0), Sampling(0.8, top_k=20, top_p=0.9, min_p=0.02)], ids=str
)
def test_steps_that_forbid_nothing_are_bursts(make_engine, sampling):
    expected = play(make_engine(sampling=sampling), by_bursts)
    found = play(make_engine(sampling=sampling), by_steps)
    assert {len(turns) for turns in found.values()} == {2}
    for stream in expected:
        assert_same(found[stream], expected[stream])


def masked_logprob(logits_V, allowed_V, temperature) -> np.ndarray:
    z = np.where(allowed_V, logits_V.astype(np.float64) / temperature, -np.inf)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def test_what_is_forbidden_is_never_said_and_the_record_is_of_what_is_left(make_engine, model):
    """Each slot has its own mask and its own temperature at every step."""
    rng, engine = np.random.default_rng(0), make_engine()
    temperatures = {0: 1.0, 1: 0.5, 2: 0.0, 3: 2.0}
    sampling = {slot: Sampling(temperature) for slot, temperature in temperatures.items()}
    slots = [engine.open(stream) for stream in range(4)]
    for slot in slots:
        engine.say(slot, words(slot, 6), 8)
    masks, turns = [], []
    while engine.speaking:
        masks.append(ON_AND_ON & (rng.random((4, VOCAB)) < 0.05))
        turns += by_steps(engine, packed(masks[-1]), sampling)
    assert len(turns) == 4 and len(masks) == 8
    all_logits = jax.jit(lambda ids_T: model.decoder.logits(model.decoder(ids_T[None])[0]))
    for turn in turns:
        ids = words(turn.slot, 6) + turn.tokens
        logits = np.asarray(all_logits(jnp.asarray(ids)))[5:-1]
        for i, token in enumerate(turn.tokens):
            allowed = masks[i][turn.slot]
            assert allowed[token]
            if temperatures[turn.slot] == 0:
                assert token == np.argmax(np.where(allowed, logits[i], -np.inf))
                assert turn.logprobs[i] == 0.0
                continue
            expected = masked_logprob(logits[i], allowed, temperatures[turn.slot])[token]
            assert turn.logprobs[i] == pytest.approx(expected, abs=1e-4)


def test_the_caller_ends_turns_and_says_what_is_certain(make_engine):
    """A turn that is ended and goes on with certain tokens is a stream that hears them."""
    expected_engine, engine = make_engine(), make_engine()
    certain, heard = words(7, 3), words(1, 6)
    slot = engine.open(1)
    engine.say(slot, heard, 20)
    for _ in range(4):
        assert by_steps(engine, NO_END) == []
    first = engine.end(slot)
    assert (first.end, len(first.tokens)) == ("caller", 4) and not engine.speaking
    engine.say(slot, certain, 5)
    (second,) = to_the_end(engine)

    slot = expected_engine.open(1)
    expected_engine.say(slot, heard, 4)
    (one,) = to_the_end(expected_engine)
    expected_engine.say(slot, certain, 5)
    (two,) = to_the_end(expected_engine)
    assert_same([first, second], [dataclasses.replace(one, end="caller"), two])


def test_slots_are_free_as_soon_as_the_caller_ends_them(make_engine):
    engine = make_engine()
    slots = [engine.open(stream) for stream in range(4)]
    for slot in slots:
        engine.say(slot, words(slot, 6), 20)
    by_steps(engine, NO_END)
    engine.end(slots[2])
    engine.close(slots[2])
    waiting = engine.open(9)
    engine.say(waiting, words(9, 6), 20)
    engine.end(waiting)  # before it was read
    engine.close(waiting)
    assert engine.free == 1
    by_steps(engine, NO_END)
    assert engine.sampled == 4 + 3


def test_a_step_is_read_before_it_is_drawn_and_drawn_before_a_turn_is_ended(make_engine):
    engine = make_engine()
    slot = engine.open(0)
    engine.say(slot, [5, 6], 4)
    with pytest.raises(ValueError, match="`read` begins a step"):
        engine.choose(ALL, {})
    engine.read()
    with pytest.raises(ValueError, match="a step is under way"):
        engine.end(slot)


# ---------------------------------------------------------------- shared prefixes

PREFIX = words(100, 25)
PROMPTS = {
    1: PREFIX + words(1, 5),
    2: PREFIX + words(2, 12),
    3: PREFIX[:20] + words(3, 6),  # shares the beginning of the prefix
    4: PREFIX[:9] + words(4, 6),  # shares too little
}


def answers(engine: Engine) -> list[Turn]:
    slots = {engine.open(stream): stream for stream in PROMPTS}
    for slot, stream in slots.items():
        engine.say(slot, PROMPTS[stream], 9)
    return sorted(to_the_end(engine), key=lambda turn: turn.slot)


def test_a_shared_prefix_changes_no_token_and_is_read_once(make_engine):
    expected_engine, engine = make_engine(), make_engine()
    expected = answers(expected_engine)
    engine.share(PREFIX)
    assert engine.prefilled == len(PREFIX)
    found = answers(engine)
    assert_same(found, expected, atol=1e-5)
    saved = 25 + 25 + 20
    assert engine.prefilled == len(PREFIX) + expected_engine.prefilled - saved


def test_the_longest_of_several_prefixes_is_taken(make_engine):
    engine, expected = make_engine(), answers(make_engine())
    for prefix in (PREFIX[:18], PREFIX, words(5, 30)):
        engine.share(prefix)
    before = engine.prefilled
    assert_same(answers(engine), expected)
    assert engine.prefilled - before == 4 + 11 + 5 + 14


def test_new_weights_and_a_reset_end_the_sharing(make_engine, make_model):
    other = unstack(make_model(1))
    expected_engine, engine = make_engine(), make_engine()
    expected_engine.weights = other
    engine.share(PREFIX)
    engine.weights = other
    assert_same(answers(engine), answers(expected_engine))
    engine.reset()
    engine.share(PREFIX)
    engine.reset()
    assert_same(answers(engine), answers_after_reset(expected_engine))
    assert engine.prefilled == expected_engine.prefilled


def answers_after_reset(engine: Engine) -> list[Turn]:
    engine.reset()
    return answers(engine)


@pytest.mark.parametrize("length", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_a_prefix_leaves_streams_under_way_alone(make_engine, length):
    """Also where the cache grows with it."""
    engine, expected_engine = make_engine(), make_engine()
    turns = []
    for e, shares in ((engine, True), (expected_engine, False)):
        slot = e.open(1)
        e.say(slot, words(1, 6), 20)
        by_steps(e, NO_END)
        if shares:
            e.share(words(6, length))
        turns.append(to_the_end(e))
    assert_same(*turns)


def test_prefixes_that_cannot_be_shared_are_errors(make_engine):
    engine = make_engine()
    for tokens in ([], words(0, 96)):
        with pytest.raises(ValueError, match=f"a prefix of {len(tokens)} tokens"):
            engine.share(tokens)
    for stream in range(4):
        engine.open(stream)
    with pytest.raises(ValueError, match="0 free slots"):
        engine.share(PREFIX)
