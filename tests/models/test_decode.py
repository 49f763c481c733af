"""Decoding token by token agrees with the decoder that is trained, in every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.models.config import DecoderConfig, RopeScaling
from jaxconv.models.decode import decode_step, empty_cache, prefill, unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead

BASE = DecoderConfig(
    family="llama",
    vocab_size=61,
    embed_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=20,
    max_positions=64,
)
FAMILIES = {
    "llama": BASE,
    "llama tied, all heads": dataclasses.replace(BASE, tie_embeddings=True, num_kv_heads=4),
    "qwen2": dataclasses.replace(BASE, family="qwen2", attention_bias=True),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True, num_kv_heads=1),
    "mistral": dataclasses.replace(
        BASE, family="mistral", sliding_window=4, sliding_layers=(True, True)
    ),
    "gemma2": dataclasses.replace(
        BASE,
        family="gemma2",
        sliding_window=4,
        sliding_layers=(True, False),
        query_scalar=21.0,
        attention_softcap=0.5,
        final_softcap=1.0,
        tie_embeddings=True,
    ),
    "gemma3": dataclasses.replace(
        BASE,
        family="gemma3_text",
        qk_norm=True,
        sliding_window=4,
        sliding_layers=(True, False),
        rope_local_theta=100.0,
        rope_scaling=RopeScaling("linear", 4.0),
        tie_embeddings=True,
    ),
}
step = jax.jit(decode_step, static_argnames="config")
fill = jax.jit(prefill, static_argnames="config")


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_equal_one_forward_pass(family):
    """Rows of different lengths: a prefill in two pieces, then one token at a time."""
    config = FAMILIES[family]
    model = Decoder(config, jax.random.key(0))
    weights = unstack(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (3, 14)).astype(np.int32)
    expected = model(jnp.asarray(tokens))
    first, second = np.array([5, 2, 4]), np.array([1, 3, 0])

    def piece(start, count):
        out = rng.integers(0, 61, (3, 5)).astype(np.int32)  # what lies behind `count` is noise
        for row in range(3):
            out[row, : count[row]] = tokens[row, start[row] : start[row] + count[row]]
        return out

    cache = empty_cache(config, 5, 16)
    rows = np.array([3, 0, 4], np.int32)
    for start, count in ((np.zeros(3, int), first), (first, second)):
        cache = fill(weights, config, cache, piece(start, count), rows, start, count)
    position = first + second
    for _ in range(7):
        fed, at = np.zeros(5, np.int32), np.full(5, 16, np.int32)
        fed[rows], at[rows] = tokens[np.arange(3), position], position
        hidden, cache = step(weights, config, cache, fed, at)
        np.testing.assert_allclose(
            hidden[rows], expected[np.arange(3), position], atol=2e-5, rtol=1e-5
        )
        position = position + 1


def test_padding_rows_and_positions_outside_write_nothing():
    weights = unstack(Decoder(BASE, jax.random.key(0)))
    cache = jax.tree.map(jnp.ones_like, empty_cache(BASE, 3, 8))
    tokens = np.ones((2, 4), np.int32)
    outside = np.array([3, 4], np.int32)
    zeros, four = np.zeros(2, np.int32), np.full(2, 4, np.int32)
    for after in (
        fill(weights, BASE, cache, tokens, outside, zeros, four),
        fill(weights, BASE, cache, tokens, np.arange(2), zeros, zeros),
        step(weights, BASE, cache, np.ones(3, np.int32), np.full(3, 8, np.int32))[1],
    ):
        assert all((x == 1).all() for x in jax.tree.leaves(after))
    some = fill(weights, BASE, cache, tokens, np.array([1, 5]), four, np.array([2, 4]))
    for layer in some:
        for x in layer:
            changed = np.asarray((x != 1).any((1, 3)))
            assert np.argwhere(changed).tolist() == [[1, 4], [1, 5]]


def test_what_lies_behind_a_row_s_position_is_not_seen():
    weights = unstack(Decoder(BASE, jax.random.key(0)))
    clean = empty_cache(BASE, 2, 8)
    dirty = jax.tree.map(lambda x: x.at[:, :, 3:].set(100.0), clean)
    args = (np.array([5, 6], np.int32), np.array([1, 2], np.int32))
    hidden, _ = step(weights, BASE, clean, *args)
    other, _ = step(weights, BASE, dirty, *args)
    np.testing.assert_array_equal(hidden, other)


def test_unstacked_weights_have_the_compute_dtype_and_the_value_head_float32():
    config = dataclasses.replace(BASE, dtype="bfloat16")
    head = ValueHead(24, 0.5)
    head.kernel[...] = jnp.full((24, 1), 2.0)
    weights = unstack(ActorCritic(Decoder(config, jax.random.key(0)), head))
    assert len(weights.layers) == 2
    dtypes = {str(x.dtype) for x in jax.tree.leaves((weights.embed, weights.layers, weights.head))}
    assert dtypes == {"bfloat16"}
    assert weights.value_kernel.dtype == weights.value_bias.dtype == jnp.float32
    assert weights.value_kernel.tolist() == [2.0] * 24 and weights.value_bias == 0.5
    bare = unstack(Decoder(BASE, jax.random.key(0)))
    assert not bare.value_kernel.any() and bare.value_bias == 0
