"""Sums over the segments of packed rows against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.batches import spread
from jaxconv.data.packing import first_fit, pack_tokens
from jaxconv.objectives.segments import last_token, pair_logprobs, segment_sums, split_pairs

W = 12


@st.composite
def packed_rows(draw):
    """(x, mask, segment_ids), each [2, W]; x is NaN wherever it must not be read."""
    ids = np.zeros((2, W), np.int32)
    for row in ids:
        lengths = draw(st.lists(st.integers(1, 5), max_size=W))
        begin = draw(st.integers(0, 2))
        for segment, n in enumerate(lengths, start=1):
            if begin + n > W:
                break
            row[begin : begin + n] = segment
            begin += n
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    mask = rng.random(ids.shape) < 0.6
    x = np.where(mask & (ids > 0), rng.normal(size=ids.shape), np.nan)
    return x.astype(np.float32), mask, ids


@settings(max_examples=60, deadline=None)
@given(packed_rows())
def test_sums_equal_a_loop(rows):
    x, mask, ids = rows
    got = np.asarray(jax.jit(segment_sums)(x, mask, ids))
    assert got.shape == (2, W) and got.dtype == np.float32
    for r in range(2):
        for s in range(1, W + 1):
            expected = sum(float(x[r, i]) for i in range(W) if ids[r, i] == s and mask[r, i])
            assert got[r, s - 1] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(packed_rows())
def test_last_token_equals_a_loop(rows):
    _, _, ids = rows
    values = np.arange(2.0 * W, dtype=np.float32).reshape(2, W) + 1
    got, present = jax.jit(last_token)(np.where(ids > 0, values, np.nan), ids)
    for r in range(2):
        for s in range(1, W + 1):
            where = np.flatnonzero(ids[r] == s)
            assert present[r, s - 1] == (where.size > 0)
            assert got[r, s - 1] == (values[r, where[-1]] if where.size else 0.0)


@settings(max_examples=60, deadline=None)
@given(packed_rows())
def test_pairs_equal_a_loop(rows):
    x, mask, ids = rows
    pairs = jax.jit(pair_logprobs)(x, mask, ids)
    assert {a.shape for a in pairs} == {(2, W // 2)}
    for r in range(2):
        for k in range(W // 2):
            sides = [(ids[r] == 2 * k + 1 + side) & mask[r] for side in (0, 1)]
            for side, total, tokens in (
                (sides[0], pairs.chosen, pairs.chosen_tokens),
                (sides[1], pairs.rejected, pairs.rejected_tokens),
            ):
                assert total[r, k] == pytest.approx(float(x[r][side].sum()), abs=1e-5)
                assert tokens[r, k] == side.sum()
            assert pairs.present[r, k] == (sides[0].any() and sides[1].any())


def test_the_gradient_is_one_on_what_was_summed():
    rng = np.random.default_rng(0)
    ids = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 4, 4, 4, 4]])
    mask = rng.random(ids.shape) < 0.6
    x = np.where(mask & (ids > 0), 1.0, np.nan).astype(np.float32)
    weight_RS = rng.normal(size=ids.shape).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(weight_RS * segment_sums(x, mask, ids)))(x)
    expected = np.where(mask & (ids > 0), np.take_along_axis(weight_RS, ids - 1, axis=1), 0.0)
    np.testing.assert_allclose(gradient, expected)


def test_short_segments_behind_long_ones_keep_their_digits():
    x = np.full((1, 4096), -1000.0, np.float32)
    x[0, -1] = 1e-3
    ids = np.ones(x.shape, np.int32)
    ids[0, -1] = 2
    assert segment_sums(x, np.ones(x.shape), ids, num_segments=2)[0, 1] == np.float32(1e-3)


def test_float64_stays_float64():
    ids = np.array([[1, 1, 2, 2]])
    with jax.enable_x64():
        pairs = pair_logprobs(np.full((1, 4), 0.1), np.ones((1, 4)), ids)
        assert pairs.chosen.dtype == np.float64
        assert pairs.chosen[0, 0] == 0.2


def test_a_segment_beyond_the_bound_is_loud():
    ids = np.array([[1, 2, 3, 0], [1, 2, 0, 0]])
    ones = np.ones(ids.shape, np.float32)
    sums = segment_sums(ones, ones, ids, num_segments=2)
    assert np.all(np.isnan(sums[0])) and np.all(np.isfinite(sums[1]))
    pairs = pair_logprobs(ones, ones, ids, num_pairs=1)
    assert pairs.present.all() and np.isnan(pairs.chosen[0, 0])
    values, present = last_token(ones, ids, num_segments=2)
    assert present.all() and np.isnan(values[0]).all()


def test_pairs_of_packed_conversations():
    # To the packer a pair is one block, to the model it is two segments.
    streams = [[5, 6, 7], [8, 9], [1, 2], [3, 4, 5, 6]]
    lengths = np.reshape([len(s) for s in streams], (2, 2))
    packing = first_fit(lengths.sum(axis=1), 16)
    batch = pack_tokens(spread(packing, lengths), streams, [[True] * len(s) for s in streams])
    pairs = pair_logprobs(batch.tokens, batch.segment_ids > 0, batch.segment_ids)
    assert pairs.present.tolist() == [[True, True] + [False] * 6]
    for k, pair in enumerate(np.argsort(packing.start)):
        assert pairs.chosen[0, k] == sum(streams[2 * pair])
        assert pairs.rejected[0, k] == sum(streams[2 * pair + 1])


def test_split_pairs():
    chosen, rejected = split_pairs(jnp.arange(6).reshape(1, 6))
    assert chosen.tolist() == [[0, 2, 4]] and rejected.tolist() == [[1, 3, 5]]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        segment_sums(np.ones((1, 3)), np.ones(3), np.ones((1, 3), int))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(3,\)"):
        last_token(np.ones(3), np.ones(3, int))
