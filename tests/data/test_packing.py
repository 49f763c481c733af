"""Packed rows: nothing is lost, nothing overlaps, and a loss is what it would be unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.packing import first_fit, microbatches, pack_tokens, shift
from jaxconv.errors import Refused

WIDTH = 17
lengths_of_streams = st.lists(st.integers(1, WIDTH), min_size=1, max_size=30)


@given(lengths_of_streams, st.integers(1, 5))
@settings(deadline=None)
def test_gather_undoes_scatter(lengths, multiple):
    packing = first_fit(lengths, WIDTH, rows_multiple=multiple)
    values = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    array = packing.scatter(values, np.int32, fill=-1)
    assert array.shape == (packing.rows, WIDTH)
    assert packing.rows % multiple == 0
    for value, back in zip(values, packing.gather(array), strict=True):
        np.testing.assert_array_equal(back, value)
    # Every token has one cell; the rest is padding.
    assert sorted(array[array >= 0]) == list(range(sum(lengths)))
    assert (array == -1).sum() == array.size - sum(lengths)


@given(lengths_of_streams)
@settings(deadline=None)
def test_first_fit_leaves_no_two_rows_half_empty(lengths):
    packing = first_fit(lengths, WIDTH)
    used = np.bincount(packing.row, packing.length, packing.rows)
    assert used.max() <= WIDTH
    assert (used <= WIDTH // 2).sum() <= 1


@given(lengths_of_streams)
@settings(deadline=None)
def test_streams_keep_apart(lengths):
    packing = first_fit(lengths, WIDTH, rows_multiple=2)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 100, n) for n in lengths]
    masks = [rng.random(n) < 0.5 for n in lengths]
    batch = pack_tokens(packing, tokens, masks)
    assert not batch.mask[batch.segment_ids == 0].any()
    seen = 0
    for row in range(packing.rows):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            cells = np.flatnonzero(batch.segment_ids[row] == segment)
            assert (np.diff(cells) == 1).all()
            assert batch.positions[row, cells].tolist() == list(range(len(cells)))
            ids = batch.tokens[row, cells]
            assert batch.targets[row, cells[:-1]].tolist() == ids[1:].tolist()
            assert not batch.mask[row, cells[-1]]
            seen += 1
    assert seen == len(lengths)
    assert batch.mask.sum() == sum(mask[1:].sum() for mask in masks)


def test_the_dtypes_are_those_of_the_arrays():
    batch = pack_tokens(first_fit([2, 3], 8), [[1, 2], [3, 4, 5]], [[True, True], [False] * 3])
    assert {x.dtype for x in (batch.tokens, batch.targets, batch.positions, batch.segment_ids)} == {
        np.dtype(np.int32)
    }
    assert batch.mask.dtype == bool
    rewards = first_fit([2], 4).scatter([[0.5, 1.5]], np.float32)
    assert rewards.dtype == np.float32 and rewards.tolist() == [[0.5, 1.5, 0.0, 0.0]]


def test_a_stream_longer_than_a_row_is_refused():
    with pytest.raises(Refused, match=r"18 tokens.*holds 17"):
        first_fit([3, 18], WIDTH)


def test_shift_moves_what_belongs_to_a_token_to_the_input_before_it():
    assert shift([1, 2, 3]).tolist() == [2, 3, 0]
    assert shift([True, True, False]).tolist() == [True, False, False]
    assert shift([0.5, 2.5], fill=9.0).tolist() == [2.5, 9.0]


def test_microbatches_split_the_rows():
    batch = pack_tokens(first_fit([8] * 6, 8), np.arange(48).reshape(6, 8), [[True] * 8] * 6)
    split = microbatches(batch, 2)
    assert split.tokens.shape == (3, 2, 8)
    np.testing.assert_array_equal(split.tokens.reshape(6, 8), batch.tokens)


def test_a_packed_loss_equals_the_unpacked_one():
    """Log-probs, values and the gradient of their sum, streams packed or one a row."""
    from jaxconv.models.config import DecoderConfig
    from jaxconv.models.decoder import Decoder
    from jaxconv.models.heads import ActorCritic, ValueHead
    from jaxconv.train.actor_critic import evaluate_tokens

    config = DecoderConfig(
        family="llama",
        vocab_size=50,
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=24,
        max_positions=64,
    )
    value_head = ValueHead(16)
    value_head.kernel[...] = jax.random.normal(jax.random.key(1), (16, 1))
    model = ActorCritic(Decoder(config, jax.random.key(0)), value_head)
    rng = np.random.default_rng(0)
    lengths = [3, 9, 4, 2, 7, 1]
    tokens = [rng.integers(0, 50, n) for n in lengths]
    masks = [rng.random(n) < 0.7 for n in lengths]

    @jax.jit
    def loss(model, batch):
        logprob, entropy, value = evaluate_tokens(model, batch)
        return jnp.where(batch.mask, logprob + entropy + value, 0).sum()

    def of(packing, tokens, masks):
        batch = jax.tree.map(jnp.asarray, pack_tokens(packing, tokens, masks))
        return jax.value_and_grad(loss)(model, batch)

    packed = of(first_fit(lengths, 10), tokens, masks)
    one_a_row = first_fit([10] * 6, 10)
    one_a_row = type(one_a_row)(one_a_row.row, one_a_row.start, np.array(lengths), 6, 10)
    unpacked = of(one_a_row, tokens, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), packed, unpacked)
    # The test would see streams that look at each other.
    blind = pack_tokens(first_fit(lengths, 10), tokens, masks)
    mixed = type(blind)(**(vars(blind) | {"segment_ids": np.ones_like(blind.segment_ids)}))
    assert abs(loss(model, mixed) - packed[0]) > 1e-3
