"""What `sample` promises a caller: filters, ties, log-probs, bad input, independence of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxconv_kernels import pack_mask, sample
from jaxconv_kernels.sampling import spec

SMALL, LARGE = 45, 5003  # neither a multiple of a cell, of a bin or of 32
FILTERS = {"top_k": 6, "top_p": 0.8, "min_p": 0.01}


@functools.partial(jax.jit, static_argnames="implementation")
def _sample(logits, keys, temperature, top_k, top_p, min_p, mask, implementation):
    return sample(
        logits,
        keys,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        mask=mask,
        implementation=implementation,
    )


def draw(
    logits,
    keys,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    allowed=None,
    implementation=None,
    batch=20,
):
    """A compilation for each vocabulary: parameters are data, and rows are padded to `batch`.

    `allowed` is bool [B, V].
    """
    rows = len(logits)
    allowed = np.ones(logits.shape, bool) if allowed is None else allowed
    parameters = (
        np.broadcast_to(np.asarray(value, dtype), (rows,))
        for value, dtype in (
            (temperature, np.float32),
            (top_k, np.int32),
            (top_p, np.float32),
            (min_p, np.float32),
        )
    )
    filled = np.arange(max(rows, batch)) % rows
    got = _sample(
        *(jnp.asarray(x)[filled] for x in (logits, keys, *parameters, pack_mask(allowed))),
        implementation,
    )
    return jax.tree.map(lambda x: x[:rows], got)


def keys_of(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


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
def test_kept_set_log_probs_and_token_equal_the_sorting_oracle(data):
    seed = data.draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    rows = 4
    # Rounded logits tie often; some tokens are ruled out.
    x = np.round(rng.normal(size=(rows, SMALL)) * 3, data.draw(st.sampled_from([0, 1, 6])))
    x = np.where(rng.random(x.shape) < 0.1, -np.inf, x).astype(np.float32)
    x[:, 0] = 0.25
    temperature = rng.choice([0.3, 1.0, 1.7], rows).astype(np.float32)
    top_k = rng.choice([0, 1, 5, SMALL, SMALL + 9], rows)
    top_p = rng.choice([0.0, 0.37, 0.9, 1.0], rows).astype(np.float32)
    min_p = rng.choice([0.0, 0.05, 1.0], rows).astype(np.float32)
    keys = keys_of(rows, seed)
    got = draw(x, keys, temperature, top_k, top_p, min_p)
    for i in range(rows):
        kept = kept_by_sorting(x[i], temperature[i], top_k[i], top_p[i], min_p[i])
        token = int(got.token[i])
        assert kept[token]
        z = np.asarray(x[i], np.float64) / temperature[i]
        mass = np.exp(z - z.max())
        expected = z[token] - z.max() - np.log(mass[kept].sum())
        assert got.logprob_processed[i] == pytest.approx(expected, abs=2e-5)
        assert got.kept_mass[i] == pytest.approx(mass[kept].sum() / mass.sum(), abs=2e-6)
        raw = np.asarray(x[i], np.float64)
        expected = raw[token] - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        assert got.logprob_raw[i] == pytest.approx(expected, abs=2e-5)
        if 0 < top_k[i] < SMALL or top_p[i] < 1 or min_p[i] > 0:
            assert got.flags[i] == spec.FILTERED
            np.testing.assert_array_equal((x[i] >= got.threshold[i]) & np.isfinite(x[i]), kept)
            z32 = (jnp.asarray(x[i]) - x[i].max()) * (1 / temperature[i])
            z32 = jnp.where(jnp.asarray(kept), z32, -jnp.inf)
            assert token == int(jax.random.categorical(keys[i], z32))
        else:
            assert got.flags[i] == 0 and got.threshold[i] == -np.inf


@pytest.mark.parametrize("vocab", [SMALL, pytest.param(1 << 18, marks=pytest.mark.slow)])
def test_a_row_does_not_depend_on_the_others(vocab):
    rows = 12  # of the larger vocabulary 8 are read at a time: the last 8 overlap the first
    x = jax.random.normal(jax.random.key(0), (rows, vocab)) * 2
    keys = keys_of(rows)
    i = np.arange(rows)
    parameters = [
        np.where(i % 4 == 1, 0.0, 0.8),
        np.where(i % 3 == 0, 4, 0),
        np.where(i % 5 == 2, 0.99, 1.0),
        np.where(i % 6 == 5, 0.01, 0.0),
    ]
    together = draw(x, keys, *parameters, batch=rows)
    order = np.random.default_rng(0).permutation(rows)
    shuffled = draw(x[order], keys[order], *(p[order] for p in parameters), batch=rows)
    for a, b in zip(together, shuffled, strict=True):
        np.testing.assert_array_equal(a[order], b)
    for batch in (1, 5):
        size = min(batch, 3)
        alone = draw(x[:size], keys[:size], *(p[:size] for p in parameters), batch=batch)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[:size], b)
    # Same logits, other keys: other tokens. Same keys: the same.
    same = draw(jnp.tile(x[:1], (rows, 1)), keys, batch=rows)
    assert len(np.unique(same.token)) > 4
    again = draw(jnp.tile(x[:1], (rows, 1)), jnp.tile(keys[:1], rows), batch=rows)
    assert len(np.unique(again.token)) == 1


@pytest.mark.parametrize("implementation", ["xla", "multipass", "reference"])
@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_greedy_takes_the_lowest_index_of_a_tie_with_log_prob_zero(vocab, implementation):
    x = np.zeros((3, vocab), np.float32)
    x[0, [7, 11, vocab - 1]] = 2.0
    x[1, 3] = np.nan
    x[1, [30, 40]] = 1.0
    x[2, [40, 9]] = 1.0  # the lower index lies in the higher cell of a small vocabulary
    got = draw(x, keys_of(3), temperature=0.0, implementation=implementation, **FILTERS)
    assert got.token.tolist() == [7, 30, 9]
    assert got.logprob_processed.tolist() == [0.0] * 3
    assert got.flags.tolist() == [spec.GREEDY] * 3
    assert got.threshold.tolist() == [2.0, 1.0, 1.0] and got.kept_mass.tolist() == [1.0] * 3
    count = np.array([vocab, vocab - 1, vocab])
    others = count - [3, 2, 2]
    expected = -np.log([3 + others[0] * np.exp(-2), *(2 + others[1:] * np.exp(-1))])
    np.testing.assert_allclose(got.logprob_raw, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "multipass", "reference"])
@pytest.mark.parametrize("filters", [{}, FILTERS])
@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_rows_without_a_token_and_rows_with_infinities_end_well(vocab, filters, implementation):
    x = np.full((7, vocab), -np.inf, np.float32)
    x[1] = np.nan
    x[2, [5, 9]] = np.inf
    x[3, 9] = -1e30
    x[4] = 0.0  # all masked
    x[5, [3, 40]] = np.inf, np.nan  # +inf not allowed
    x[5, 8] = 1.0
    x[6, [2, 3]] = 3e38, -3e38
    allowed = np.ones(x.shape, bool)
    allowed[4] = False
    allowed[5, 3] = False
    got = draw(x, keys_of(7), allowed=allowed, implementation=implementation, **filters)
    assert got.token.tolist() == [0, 0, 5, 9, 0, 8, 2]
    flags = np.asarray(got.flags) & ~(spec.FILTERED | spec.FALLBACK)
    assert flags.tolist() == [1, 1, spec.INFINITE, 0, 1, 0, 0]
    inf = np.inf
    assert got.logprob_processed.tolist() == [-inf, -inf, 0, 0, -inf, 0, 0]
    assert got.logprob_raw.tolist() == [-inf, -inf, 0, 0, -inf, -inf, 0]
    assert got.kept_mass.tolist() == [0, 0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("implementation", ["xla", "multipass", "reference"])
@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_edges_of_the_parameters(vocab, implementation):
    x = np.asarray(jax.random.normal(jax.random.key(5), (vocab,)), np.float32)
    best = int(x.argmax())
    one_hot = np.where(np.arange(vocab) == 17, 0, -np.inf)
    equal = np.full(vocab, 0.5)
    few = np.where(np.isin(np.arange(vocab), [4, 30, 44]), 1.0, -np.inf)
    cases = [  # logits, temperature, top_k, top_p, min_p; tokens that may come
        (x, 1.0, 1, 1.0, 0.0, {best}),
        (x, 1.0, vocab, 1.0, 0.0, None),
        (x, 1.0, 0, 0.0, 0.0, {best}),
        (x, 1.0, 0, -1.0, 0.0, {best}),
        (x, 1.0, 0, 1.0, 1.0, {best}),
        (x, 1.0, 0, 1.0, 2.0, {best}),
        (x, 1e-3, 0, 0.9, 0.0, {best}),
        (x, 1e-20, 0, 1.0, 0.0, {best}),
        (x, 100.0, 0, 0.999, 0.0, None),
        (x, -1.0, 3, 0.5, 0.0, {best}),
        (one_hot, 1.0, 5, 0.9, 0.1, {17}),
        (one_hot, 1.0, 0, 1.0, 0.0, {17}),
        (equal, 1.0, 3, 0.5, 0.5, None),
        (few, 1.0, 10, 1.0, 0.0, {4, 30, 44}),
        (few, 1.0, 10, 0.99, 0.0, {4, 30, 44}),
    ]
    logits, temperature, top_k, top_p, min_p, tokens = zip(*cases, strict=True)
    got = draw(
        np.stack(logits).astype(np.float32),
        keys_of(len(cases)),
        *map(np.array, (temperature, top_k, top_p, min_p)),
        implementation=implementation,
    )
    for token, expected in zip(got.token.tolist(), tokens, strict=True):
        assert 0 <= token < vocab and (expected is None or token in expected)
    assert np.isfinite(got.logprob_processed).all() and np.isfinite(got.logprob_raw).all()
    assert (np.asarray(got.kept_mass) > 0).all() and (np.asarray(got.kept_mass) <= 1).all()
    # Ties with the threshold stay: of equal logits all.
    assert got.kept_mass[12] == pytest.approx(1) and got.threshold[12] == 0.5
    # A list of fewer tokens than k is complete: no fallback for its sake.
    if implementation == "xla":
        assert not np.any(np.asarray(got.flags)[13:] & spec.FALLBACK)


@pytest.mark.parametrize("implementation", ["xla", "multipass", "reference"])
@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_parameters_without_bound_or_number_have_a_rule(vocab, implementation):
    """An endless temperature is even, also over what a mask leaves; NaN is greedy, or off."""
    logits = np.random.default_rng(4).normal(size=(20, vocab)).astype(np.float32)
    allowed = np.arange(vocab)[None].repeat(20, 0) % 2 == 0
    keys = keys_of(20)
    even = draw(logits, keys, np.inf, allowed=allowed, implementation=implementation)
    assert len(set(even.token.tolist())) > 5 and (even.token % 2 == 0).all()
    np.testing.assert_allclose(even.logprob_processed, -np.log((vocab + 1) // 2), rtol=1e-5)
    greedy = draw(logits, keys, np.nan, implementation=implementation)
    np.testing.assert_array_equal(greedy.token, logits.argmax(1))
    off = draw(logits, keys, 1.0, 0, np.nan, np.nan, implementation=implementation)
    np.testing.assert_array_equal(off.token, draw(logits, keys).token)


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_masked_tokens_are_never_drawn_and_the_raw_log_prob_ignores_the_mask(vocab):
    rows = 20
    x = np.tile(np.linspace(0, 1, vocab, dtype=np.float32), (rows, 1))
    allowed = np.zeros((rows, vocab), bool)
    allowed[:, [2, vocab - 5]] = True
    for filters in ({}, {"top_k": 2, "top_p": 0.999}):
        got = draw(x, keys_of(rows), allowed=allowed, **filters)
        assert set(got.token.tolist()) == {2, vocab - 5}
        two = np.exp(x[0, [2, vocab - 5]])
        second = (np.asarray(got.token) == vocab - 5).astype(int)
        np.testing.assert_allclose(
            got.logprob_processed, np.log(two / two.sum())[second], atol=2e-6
        )
        raw = x[0] - np.log(np.exp(np.float64(x[0])).sum())
        np.testing.assert_allclose(got.logprob_raw, raw[np.asarray(got.token)], atol=2e-6)


def test_packed_bits_are_those_of_the_tokens():
    allowed = np.zeros((2, 70), bool)
    allowed[0, [0, 31, 32, 69]] = True
    words = pack_mask(jnp.asarray(allowed))
    assert words.dtype == jnp.uint32
    assert words.tolist() == [[1 | 1 << 31, 1, 1 << 5], [0, 0, 0]]


@pytest.mark.parametrize("vocab", [SMALL, LARGE])
def test_bfloat16_logits_tie_and_give_what_their_float32_copies_give(vocab):
    rows = 16
    x = (jax.random.normal(jax.random.key(1), (rows, vocab)) * 3).astype(jnp.bfloat16)
    for filters in ({}, {"top_k": 9, "top_p": 0.95}):
        half = draw(x, keys_of(rows), **filters)
        full = draw(x.astype(jnp.float32), keys_of(rows), **filters)
        for a, b in zip(half, full, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    kth = np.sort(np.asarray(x, np.float32))[:, -9]
    only_k = draw(x, keys_of(rows), top_k=9)
    np.testing.assert_array_equal(only_k.threshold, kth)


def test_log_probs_are_within_2e6_of_float64():
    rows, vocab = 20, LARGE
    x = np.asarray(jax.random.normal(jax.random.key(2), (rows, vocab)) * 4, np.float32)
    temperature = np.linspace(0.6, 1.5, rows).astype(np.float32)
    top_k = np.where(np.arange(rows) % 2, 0, 40)
    got = draw(x, keys_of(rows), temperature, top_k)
    at = np.arange(rows), np.asarray(got.token)
    raw = np.float64(x) - np.float64(x).max(-1, keepdims=True)
    expected = raw[at] - np.log(np.exp(raw).sum(-1))
    np.testing.assert_allclose(got.logprob_raw, expected, atol=2e-6)
    z = raw / np.float64(temperature)[:, None]
    kept = x >= np.asarray(got.threshold)[:, None]
    expected = z[at] - np.log(np.where(kept, np.exp(z), 0).sum(-1))
    np.testing.assert_allclose(got.logprob_processed, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementation": "cuda"}, "implementation='cuda'; it must be one of xla, "),
        ({"mask": jnp.ones((2, 64), bool)}, r"mask is bool\(2, 64\); it must be uint32\[2, 2\]"),
        ({"keys": jnp.zeros((2, 2), jnp.uint32)}, "keys is uint32; it must be typed keys"),
        ({"keys": jax.random.key(0)}, r"it must be threefry keys \[2\]"),
        ({"keys": jax.random.split(jax.random.key(0, impl="rbg"), 2)}, "must be threefry keys"),
        ({"logits": jnp.zeros(64)}, r"logits has shape \(64,\); it must be \[B, V\]"),
        ({"logits": jnp.zeros((2, 64), jnp.int32)}, "logits is int32; it must be float32 or"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    logits = arguments.pop("logits", jnp.zeros((2, 64)))
    keys = arguments.pop("keys", keys_of(2))
    with pytest.raises(ValueError, match=message):
        sample(logits, keys, **arguments)
