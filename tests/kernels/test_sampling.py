"""The batched sampler against a sort-based oracle, `jax.random.categorical` and exact counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxconv_kernels import sample

VOCAB = 45  # not a multiple of the cell of the unfiltered draw


@jax.jit
def _sample(logits, keys, temperature, top_k, top_p, min_p, mask):
    return sample(
        logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, mask=mask
    )


def draw(logits, keys, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mask=None):
    """Jitted once a shape: every parameter is data."""
    rows = logits.shape[0]
    parameters = (
        jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))
        for value, dtype in (
            (temperature, jnp.float32),
            (top_k, jnp.int32),
            (top_p, jnp.float32),
            (min_p, jnp.float32),
        )
    )
    mask = jnp.ones(logits.shape, bool) if mask is None else mask
    return _sample(jnp.asarray(logits, jnp.float32), keys, *parameters, mask)


def kept_by_sorting(x, temperature, top_k, top_p, min_p):
    """The kept set of one row, in float64, by the textbook procedure."""
    z = np.asarray(x, np.float64) / temperature
    kept = np.isfinite(z)
    if 0 < top_k < len(z):
        kept &= z >= np.sort(z)[::-1][top_k - 1]
    mass = np.where(kept, np.exp(z - z.max()), 0.0)
    if top_p < 1:
        above = np.array([mass[z > value].sum() for value in z])
        kept &= (above < top_p * mass.sum()) | (z == z.max())
    if min_p > 0:
        kept &= z >= z.max() + np.log(min(min_p, 1.0))
    return kept


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_kept_set_log_prob_and_token_equal_the_sorting_oracle(data):
    seed = data.draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    rows = 4
    # Rounded logits tie often; some tokens are ruled out.
    x = np.round(rng.normal(size=(rows, VOCAB)) * 3, data.draw(st.sampled_from([0, 1, 6])))
    x = np.where(rng.random(x.shape) < 0.1, -np.inf, x).astype(np.float32)
    x[:, 0] = 0.25
    temperature = rng.choice([0.3, 1.0, 1.7], rows).astype(np.float32)
    top_k = rng.choice([0, 1, 5, VOCAB, VOCAB + 9], rows)
    top_p = rng.choice([0.0, 0.37, 0.9, 1.0], rows).astype(np.float32)
    min_p = rng.choice([0.0, 0.05, 1.0], rows).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), rows)
    got = draw(x, keys, temperature, top_k, top_p, min_p)
    for i in range(rows):
        kept = kept_by_sorting(x[i], temperature[i], top_k[i], top_p[i], min_p[i])
        token = int(got.token[i])
        assert kept[token]
        z = np.asarray(x[i], np.float64) / temperature[i]
        expected = z[token] - z.max() - np.log(np.exp(z - z.max())[kept].sum())
        assert got.logprob_processed[i] == pytest.approx(expected, abs=2e-5)
        raw = np.asarray(x[i], np.float64)
        expected = raw[token] - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        assert got.logprob_raw[i] == pytest.approx(expected, abs=2e-5)
        if 0 < top_k[i] < VOCAB or top_p[i] < 1 or min_p[i] > 0:
            z32 = (jnp.asarray(x[i]) - x[i].max()) * (1 / temperature[i])
            z32 = jnp.where(jnp.asarray(kept), z32, -jnp.inf)
            assert token == int(jax.random.categorical(keys[i], z32))


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.8, "temperature": 0.7}])
def test_frequencies_follow_the_processed_distribution(filters):
    rows = 40_000
    x = np.asarray(jax.random.normal(jax.random.key(3), (VOCAB,)) * 1.5)
    keys = jax.random.split(jax.random.key(4), rows)
    got = draw(np.tile(x, (rows, 1)), keys, **filters)
    counts = np.bincount(got.token, minlength=VOCAB)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    kept = kept_by_sorting(x, **settings)
    mass = np.where(kept, np.exp(x / settings["temperature"]), 0)
    expected = rows * mass / mass.sum()
    assert counts[~kept].sum() == 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom)  # about one false alarm in 10^5


def test_a_row_does_not_depend_on_the_others():
    rows = 12
    x = jax.random.normal(jax.random.key(0), (rows, VOCAB))
    keys = jax.random.split(jax.random.key(1), rows)
    top_k = jnp.where(jnp.arange(rows) % 3 == 0, 4, 0)
    temperature = jnp.where(jnp.arange(rows) % 4 == 1, 0.0, 0.8)
    together = draw(x, keys, temperature, top_k)
    for i in range(rows):
        alone = draw(x[i : i + 1], keys[i : i + 1], temperature[i], top_k[i])
        assert alone.token[0] == together.token[i]
        np.testing.assert_allclose(
            alone.logprob_processed[0], together.logprob_processed[i], atol=1e-6
        )


def test_greedy_takes_the_lowest_index_of_a_tie_with_log_prob_zero():
    x = np.zeros((2, VOCAB), np.float32)
    x[0, [7, 11]] = 2.0
    x[1, 3] = np.nan
    x[1, 30] = 1.0
    got = draw(x, jax.random.split(jax.random.key(0), 2), temperature=0.0, top_k=3, top_p=0.1)
    assert got.token.tolist() == [7, 30]
    assert got.logprob_processed.tolist() == [0.0, 0.0]


def test_masked_tokens_are_never_drawn_and_the_raw_log_prob_ignores_the_mask():
    rows = 500
    x = np.tile(np.linspace(0, 3, VOCAB, dtype=np.float32), (rows, 1))
    mask = np.zeros((rows, VOCAB), bool)
    mask[:, [2, 40]] = True
    keys = jax.random.split(jax.random.key(2), rows)
    got = draw(x, keys, mask=jnp.asarray(mask))
    assert set(got.token.tolist()) == {2, 40}
    two = np.exp(x[0, [2, 40]])
    expected = np.log(two / two.sum())[(np.asarray(got.token) == 40).astype(int)]
    np.testing.assert_allclose(got.logprob_processed, expected, atol=1e-5)
    raw = x[0] - np.log(np.exp(x[0]).sum())
    np.testing.assert_allclose(got.logprob_raw, raw[np.asarray(got.token)], atol=1e-5)


def test_rows_without_a_token_and_rows_with_infinities_end_well():
    x = np.full((4, VOCAB), -np.inf, np.float32)
    x[1] = np.nan
    x[2, 5] = np.inf
    x[3, 9] = -1e30
    for filters in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        got = draw(x, jax.random.split(jax.random.key(0), 4), **filters)
        assert got.token.tolist() == [0, 0, 5, 9]
        assert got.empty.tolist() == [True, True, False, False]
        assert got.logprob_processed.tolist() == [-np.inf, -np.inf, 0.0, 0.0]


def test_tiny_temperature_is_finite():
    x = np.linspace(0, 1, VOCAB, dtype=np.float32)[None]
    got = draw(x, jax.random.split(jax.random.key(0), 1), temperature=1e-20)
    assert got.token[0] == VOCAB - 1 and got.logprob_processed[0] == 0.0
