"""`linear_logprob` against autodiff through materialised logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import linear_logprob as public
from jaxconv_kernels.linear_logprob import _chunked_logprob

N, D, V = 37, 16, 61


def naive(hidden, lm_head, targets, temperature, softcap):
    a = hidden @ lm_head
    a = a if softcap is None else softcap * jnp.tanh(a / softcap)
    logp = jax.nn.log_softmax(a / jnp.reshape(temperature, (-1, 1)))
    chosen = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (N, D))
    lm_head = jax.random.normal(keys[1], (D, V)) * 0.7
    targets = jax.random.randint(keys[2], (N,), 0, V)
    return hidden, lm_head, targets, jax.random.normal(keys[3], (2, N))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "rows"])
@pytest.mark.parametrize("chunk", [None, 8, N])
def test_values_and_gradients_equal_the_naive_form(chunk, temperature, softcap):
    hidden, lm_head, targets, cotangents = inputs()
    temperature = jnp.linspace(0.5, 2, N) if temperature == "rows" else temperature
    inverse = 1.0 / jnp.broadcast_to(jnp.asarray(temperature), (N,))

    def ours(hidden, lm_head):
        if chunk is None:
            return public(hidden, lm_head, targets, temperature=temperature, softcap=softcap)
        return _chunked_logprob(softcap, chunk, hidden, lm_head, targets, inverse)

    def peer(hidden, lm_head):
        return naive(hidden, lm_head, targets, temperature, softcap)

    values, pull = jax.vjp(ours, hidden, lm_head)
    expected, pull_naive = jax.vjp(peer, hidden, lm_head)
    for got, want in zip(values, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    for got, want in zip(pull(tuple(cotangents)), pull_naive(tuple(cotangents)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_many_tokens_make_no_buffer_of_all_logits():
    rows, vocab = 16_384, 20_000
    hidden = jax.ShapeDtypeStruct((rows, 8), jnp.float32)
    lm_head = jax.ShapeDtypeStruct((8, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def loss(hidden, lm_head, targets):
        logprob, entropy = public(hidden, lm_head, targets)
        return jnp.sum(logprob + 0.1 * entropy)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, lm_head, targets).compile()
    # 1.3 GB of logits, of which one chunk of 0.5 GB at a time may exist, with its gradient.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.15e9


def test_bfloat16_hidden_states_keep_a_float32_log_sum_exp():
    hidden, lm_head, targets, _ = inputs()
    half = hidden.astype(jnp.bfloat16)
    logprob, entropy = public(half, lm_head, targets)
    assert logprob.dtype == entropy.dtype == jnp.float32
    rounded = lm_head.astype(jnp.bfloat16).astype(jnp.float32)
    expected, _ = naive(half.astype(jnp.float32), rounded, targets, 1.0, None)
    np.testing.assert_allclose(logprob, expected, atol=2e-5)
    d_hidden, d_head = jax.grad(lambda h, w: public(h, w, targets)[0].sum(), argnums=(0, 1))(
        half, lm_head
    )
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32


def test_vmap_and_jit_compose():
    hidden, lm_head, targets, _ = inputs()
    stacked = jnp.stack([hidden, hidden + 1])
    got = jax.jit(jax.vmap(lambda h: public(h, lm_head, targets)[0]))(stacked)
    np.testing.assert_allclose(got[1], public(hidden + 1, lm_head, targets)[0], atol=1e-5)
