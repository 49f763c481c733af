"""One result from every form: reference, sort-free, forced fallback, several pieces."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxconv_kernels import pack_mask, sample
from jaxconv_kernels.sampling import spec, tournament, xla

ROWS = 64
PIECES = (0, 4096, 6144, 9001)  # borders, on those of cells


@functools.partial(jax.jit, static_argnames="implementation")
def _sample(logits, keys, parameters, mask, implementation="xla"):
    return sample(logits, keys, **parameters, mask=mask, implementation=implementation)


@jax.jit
def _sample_in_pieces(logits, keys, parameters, mask):
    vocab = logits.shape[1]
    row_parameters = spec.row_parameters(len(logits), vocab, **parameters)
    parts = [
        xla.statistics(
            logits[:, i:j], i, row_parameters, mask[:, i // 32 : -(-j // 32)], vocab=vocab
        )
        for i, j in itertools.pairwise(PIECES)
    ]
    keys_B2 = jax.random.key_data(keys)
    return xla.draw(xla.merge(parts), logits, keys_B2, row_parameters, mask)


def batch(seed, rows, vocab):
    """Peaked and flat rows, some tied, some with tokens ruled out; all kinds of parameters."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, vocab)) * rng.choice([0.5, 2, 6], (rows, 1))
    x = np.where(rng.random((rows, 1)) < 0.2, np.round(x, 1), x)
    x = np.where(rng.random(x.shape) < rng.choice([0, 0.3, 0.999], (rows, 1)), -np.inf, x)
    x[:, 3] = 0.1
    parameters = {
        "temperature": rng.choice([0, 0.3, 1, 1, 1.7], rows).astype(np.float32),
        "top_k": rng.choice([0, 0, 1, 5, 50, 700, vocab], rows),
        "top_p": rng.choice([0.01, 0.5, 0.9, 0.97, 1, 1], rows).astype(np.float32),
        "min_p": rng.choice([0, 0, 0.01, 0.3], rows).astype(np.float32),
    }
    keys = jax.random.split(jax.random.key(seed), rows)
    allowed = rng.random((rows, vocab)) < rng.choice([0.5, 1], (rows, 1))
    allowed[:, 3] = True
    return jnp.asarray(x, jnp.float32), keys, parameters, pack_mask(jnp.asarray(allowed))


def on_the_edge(logits, parameters, mask):
    """bool [B]: rows where some mass above a token is within 1e-6 of top_p of the whole, so that
    the order of a sum may decide; and tau [B] of all rows, by sorting in float64.
    """
    x = np.asarray(xla._masked(spec.clean(logits), mask))
    edge, tau = np.zeros(len(x), bool), np.full(len(x), -np.inf, np.float32)
    row_parameters = spec.row_parameters(*x.shape, **parameters)
    row_parameters = jax.tree.map(np.asarray, row_parameters)
    for i, row in enumerate(x):
        _, k, p, margin = (row_parameters[j][i] for j in (0, 2, 3, 4))
        ordered = np.sort(row)[::-1]
        z = (ordered - ordered[0]) * row_parameters.scale[i]
        mass = np.exp(np.float64(z))
        if k > 0:
            tau[i] = ordered[k - 1]
            mass = np.where(ordered >= tau[i], mass, 0)
        if p < 1:
            starts = np.flatnonzero(np.r_[True, ordered[1:] < ordered[:-1]])
            above = (np.cumsum(mass) - mass)[starts] / mass.sum()
            edge[i] = np.abs(above - p).min() < 1e-6
            stays = ordered[starts][(above < p) & (mass[starts] > 0)]
            tau[i] = max(tau[i], stays.min() if p > 0 else ordered[0])
        tau[i] = max(tau[i], ordered[0] + margin)
    return edge, tau


@pytest.mark.parametrize("vocab", [500, 9001])
def test_threshold_and_token_are_those_of_a_sort(vocab):
    skipped = 0
    for seed in range(4):
        logits, keys, parameters, mask = batch(seed, ROWS, vocab)
        got = _sample(logits, keys, parameters, mask)
        edge, tau = on_the_edge(logits, parameters, mask)
        rows = (np.asarray(got.flags) & spec.FILTERED > 0) & ~edge
        skipped += edge.sum()
        assert rows.sum() > ROWS / 2
        np.testing.assert_array_equal(np.asarray(got.threshold)[rows], tau[rows])
        # To the token: a draw by `jax.random.categorical` from the masked logits.
        x = xla._masked(spec.clean(logits), mask)
        scale = spec.row_parameters(*x.shape, **parameters).scale
        z = (x - x.max(-1, keepdims=True)) * scale[:, None]
        z = jnp.where(x >= tau[:, None], z, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(keys, z)
        np.testing.assert_array_equal(np.asarray(got.token)[rows], np.asarray(drawn)[rows])
    assert skipped < 0.01 * 4 * ROWS


@pytest.mark.parametrize("vocab", [500, 9001])
def test_every_form_gives_the_same(vocab):
    logits, keys, parameters, mask = batch(10, ROWS, vocab)
    got = _sample(logits, keys, parameters, mask)
    edge, _ = on_the_edge(logits, parameters, mask)
    assert edge.mean() < 0.05
    if vocab > spec.SMALL_VOCAB:
        fallback = np.asarray(got.flags) & spec.FALLBACK > 0
        filtered = np.asarray(got.flags) & spec.FILTERED > 0
        assert fallback.any() and (filtered & ~fallback).any()
    for implementation in ("multipass", "reference"):
        other = _sample(logits, keys, parameters, mask, implementation)
        for name in ("token", "threshold"):
            a, b = getattr(got, name), getattr(other, name)
            np.testing.assert_array_equal(np.asarray(a)[~edge], np.asarray(b)[~edge], name)
        # The kept mass is a sum over other lists: to rounding.
        for name in ("logprob_raw", "logprob_processed", "kept_mass"):
            a, b = getattr(got, name), getattr(other, name)
            np.testing.assert_allclose(
                np.asarray(a)[~edge], np.asarray(b)[~edge], rtol=1e-6, atol=1e-6
            )
        a, b = (np.asarray(x.flags) & ~spec.FALLBACK for x in (got, other))
        np.testing.assert_array_equal(a, b)
        if implementation == "multipass" and vocab > spec.SMALL_VOCAB:
            assert ((np.asarray(other.flags) & spec.FALLBACK > 0) == filtered).all()


def test_pieces_of_the_vocabulary_merge_to_the_whole_bit_for_bit():
    logits, keys, parameters, mask = batch(11, ROWS, PIECES[-1])
    whole = _sample(logits, keys, parameters, mask)
    pieces = _sample_in_pieces(logits, keys, parameters, mask)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)


def test_parameters_are_data():
    logits, keys, parameters, mask = batch(12, ROWS, 500)
    _sample(logits, keys, parameters, mask)
    compiled = _sample._cache_size()
    _sample(logits, keys, {name: x[::-1].copy() for name, x in parameters.items()}, mask)
    assert _sample._cache_size() == compiled


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_forms_agree_on_random_batches(seed):
    logits, keys, parameters, mask = batch(seed, 16, 4997)
    edge, tau = on_the_edge(logits, parameters, mask)
    got = _sample(logits, keys, parameters, mask)
    other = _sample(logits, keys, parameters, mask, "multipass")
    same = ~edge
    np.testing.assert_array_equal(np.asarray(got.token)[same], np.asarray(other.token)[same])
    np.testing.assert_array_equal(
        np.asarray(got.threshold)[same], np.asarray(other.threshold)[same]
    )
    filtered = same & (np.asarray(got.flags) & spec.FILTERED > 0)
    np.testing.assert_array_equal(np.asarray(got.threshold)[filtered], tau[filtered])


def test_candidates_are_the_largest_of_each_bin_lower_index_first():
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(2, 7 * spec.BINS)), 1).astype(np.float32)
    x[0, :: spec.BINS] = [-np.inf, 1, -np.inf, 1, 3, -np.inf, -np.inf]
    got = jax.jit(tournament.tournament)(x, 2048)
    by_bin = x.reshape(2, 7, spec.BINS)
    order = np.argsort(-by_bin, axis=1, kind="stable")[:, : spec.LEVELS]
    logit = np.take_along_axis(by_bin, order, axis=1)
    token = np.where(np.isneginf(logit), spec.NO_TOKEN, 2048 + order * spec.BINS)
    token = np.where(np.isneginf(logit), spec.NO_TOKEN, token + np.arange(spec.BINS))
    np.testing.assert_array_equal(got.logit, logit)
    np.testing.assert_array_equal(got.token, token)
    np.testing.assert_array_equal(got.worst, logit[:, -1].max(-1))


@pytest.mark.parametrize("rows", [9, 16, 100])
@pytest.mark.parametrize("shape", [(1, 32), (64, 32), (2, 75, 128)])
def test_rows_are_summed_by_fours_whatever_the_batch(shape, rows):
    rng = np.random.default_rng(0)
    shape = (*shape[:-1], rows, shape[-1])
    x = np.float32(rng.random(shape) * np.exp(rng.normal(size=shape)))
    parts = list(np.moveaxis(x, -2, 0))
    for _ in range(2):
        parts = [functools.reduce(np.add, parts[i : i + 4]) for i in range(0, len(parts), 4)]
    expected = functools.reduce(np.add, parts)
    for computed in (False, True):
        got = jax.jit(functools.partial(spec.row_sum, computed=computed))(x)
        np.testing.assert_array_equal(got, expected)
    got = jax.jit(lambda x: spec.sum_of_rows(list(jnp.moveaxis(x, -2, 0))))(x)
    np.testing.assert_array_equal(got, expected)
    while expected.shape[-1] > 1:
        expected = np.add(*np.split(expected, 2, axis=-1))
    np.testing.assert_array_equal(jax.jit(spec.lane_sum)(x), expected[..., 0])
