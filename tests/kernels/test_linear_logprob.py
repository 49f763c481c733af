"""`linear_logprob` against autodiff through materialised logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxconv_kernels import linear_logprob as public
from jaxconv_kernels.linear_logprob import vjp

N, D, V = 37, 16, 61


def naive(hidden, lm_head, targets, temperature=1.0, softcap=None):
    a = jnp.dot(hidden, lm_head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    a = a if softcap is None else softcap * jnp.tanh(a / softcap)
    logp = jax.nn.log_softmax(a / jnp.reshape(temperature, (-1, 1)))
    chosen = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def chunked(size, hidden, lm_head, targets, temperature, softcap):
    inverse = 1.0 / jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    return vjp._chunked(vjp.Form(softcap), size, hidden, lm_head, targets, inverse)


def inputs(seed=0, rows=N, vocab=V):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (rows, D))
    lm_head = jax.random.normal(keys[1], (D, vocab)) * 0.7
    targets = jax.random.randint(keys[2], (rows,), 0, vocab)
    return hidden, lm_head, targets, jax.random.normal(keys[3], (2, rows))


def assert_same(ours, peer, hidden, lm_head, cotangents):
    """Values and gradients, both outputs with cotangents of their own."""

    @jax.jit
    def both(hidden, lm_head, cotangents):
        results = []
        for form in (ours, peer):
            values, pull = jax.vjp(form, hidden, lm_head)
            results.append((*values, *pull(cotangents)))
        return results

    for got, want in zip(*both(hidden, lm_head, tuple(cotangents)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "rows"])
@pytest.mark.parametrize("chunk", [None, 8, N])
def test_values_and_gradients_equal_the_naive_form(chunk, temperature, softcap):
    hidden, lm_head, targets, cotangents = inputs()
    temperature = jnp.linspace(0.5, 2, N) if temperature == "rows" else temperature

    def ours(hidden, lm_head):
        if chunk is None:
            return public(hidden, lm_head, targets, temperature=temperature, softcap=softcap)
        return chunked(chunk, hidden, lm_head, targets, temperature, softcap)

    def peer(hidden, lm_head):
        return naive(hidden, lm_head, targets, temperature, softcap)

    assert_same(ours, peer, hidden, lm_head, cotangents)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 16, 33]),
    vocab=st.sampled_from([2, 3, 128, 131]),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
    softcap=st.none() | st.floats(0.5, 50),
    temperatures=st.tuples(st.floats(0.3, 4), st.floats(0.3, 4)),
    border=st.sampled_from(["first", "last", "any"]),
    weights=st.tuples(*(st.sampled_from([0.0, 1.0, -0.5]) for _ in range(2))),
)
def test_any_sizes_and_options(rows, vocab, chunk, seed, softcap, temperatures, border, weights):
    hidden, lm_head, targets, cotangents = inputs(seed, rows, vocab)
    targets = {"first": jnp.zeros_like(targets), "last": targets * 0 + vocab - 1}.get(
        border, targets
    )
    temperature = jnp.linspace(*temperatures, rows)
    assert_same(
        lambda h, w: chunked(min(chunk, rows), h, w, targets, temperature, softcap),
        lambda h, w: naive(h, w, targets, temperature, softcap),
        hidden,
        lm_head,
        cotangents * jnp.asarray(weights)[:, None],
    )


@given(rows=st.integers(1, 1 << 20), vocab=st.integers(1, 655_360))
def test_chunks_keep_to_the_budget_and_hold_little_padding(rows, vocab):
    size = vjp._chunk_rows(rows, vocab)
    assert 1 <= size <= rows and size * vocab <= max(vjp._CHUNK, 256 * vocab)
    assert size == rows or size % 128 == 0
    chunks = -(-rows // size)
    assert chunks * size - rows < 128 * chunks


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2])
def test_peak_memory_is_a_small_part_of_the_naive_forms(dtypes):
    """A training step's shapes; nothing of them is allocated."""
    rows, vocab, width = 8192, 151_936, 1024
    hidden = jax.ShapeDtypeStruct((rows, width), dtypes[0])
    lm_head = jax.ShapeDtypeStruct((width, vocab), dtypes[1])
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def temporary_bytes(form):
        def loss(hidden, lm_head, targets):
            logprob, entropy = form(hidden, lm_head, targets)
            return jnp.sum(logprob + 0.1 * entropy)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = step.lower(hidden, lm_head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporary_bytes(naive)
    assert whole > 2 * rows * vocab * 4
    assert temporary_bytes(public) <= 0.15 * whole


def test_bfloat16_hidden_states_keep_a_float32_log_sum_exp():
    hidden, lm_head, targets, cotangents = inputs()
    half = hidden.astype(jnp.bfloat16)
    rounded = half.astype(jnp.float32), lm_head.astype(jnp.bfloat16).astype(jnp.float32)
    expected, pull_naive = jax.vjp(lambda h, w: naive(h, w, targets), *rounded)
    for ours in (public, lambda *arrays: chunked(8, *arrays, 1.0, None)):
        values, pull = jax.vjp(lambda h, w, ours=ours: ours(h, w, targets), half, lm_head)
        for got, want in zip(values, expected, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, atol=2e-5)
        gradients = pull(tuple(cotangents))
        assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
        # The logits' gradient is rounded to 8 bits before the matrix products.
        for got, want in zip(gradients, pull_naive(tuple(cotangents)), strict=True):
            np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.04, rtol=0.01)


def test_many_small_parts_of_the_heads_gradient_are_not_lost():
    """Sums over 512 chunks in a bfloat16 buffer would stop growing at 256 of them."""
    rows = 512
    hidden, lm_head = jnp.ones((rows, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    targets = jnp.zeros(rows, jnp.int32)
    gradient = jax.grad(lambda w: chunked(1, hidden, w, targets, 1.0, None)[0].sum())(lm_head)
    np.testing.assert_array_equal(gradient, [[rows / 2, -rows / 2]])


@pytest.mark.parametrize("chunk", [None, 8])
def test_vmap_and_jit_compose(chunk):
    hidden, lm_head, targets, _ = inputs()

    def logprob(hidden):
        if chunk is None:
            return public(hidden, lm_head, targets)[0]
        return chunked(chunk, hidden, lm_head, targets, 1.0, None)[0]

    got = jax.jit(jax.vmap(logprob))(jnp.stack([hidden, hidden + 1]))
    np.testing.assert_allclose(got[1], naive(hidden + 1, lm_head, targets)[0], atol=1e-5)


# ---------------------------------------------------------------- accelerators

SHAPES = [((8192, 1024), "bfloat16"), ((1024, 151_936), "bfloat16"), ((8192,), "int32")]

PROGRAM = f"""
import jax
from jaxconv_kernels import linear_logprob

def loss(hidden, lm_head, targets):
    logprob, entropy = linear_logprob(hidden, lm_head, targets, temperature=0.7, softcap=30.0)
    return logprob.sum() + 0.1 * entropy.sum()

call = jax.value_and_grad(loss, (0, 1))
shapes = {SHAPES!r}
"""


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators_without_a_buffer_of_all_logits(platform, lower):
    scope = {}
    exec(PROGRAM, scope)
    module = lower(platform, scope["call"], *(jax.ShapeDtypeStruct(*s) for s in SHAPES))
    assert "tensor<1024x151936xf32>" in module
    assert "8192x151936" not in module


@pytest.mark.slow
def test_compiles_for_tpus(compile_for_tpu):
    """All logits take 5 GB, those of a chunk 0.6 GB, and as much the gradient of the head."""
    for chip, compiled in compile_for_tpu(PROGRAM).items():
        assert compiled["temporary_bytes"] < 1.7e9, chip
