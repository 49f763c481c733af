"""Prefill attention for TPU: the blocks of keys that a block of queries sees stream through VMEM.

The grid is (pieces, key heads, blocks of queries, blocks of keys). Rows, starts and counts are
prefetched: the index map of a block of keys finds the piece's row in the cache, so that no row is
copied, and names a block again that it has named where there is nothing to see, which Pallas then
does not copy. The queries of a key head's group lie in one block, one head after the other; maximum
and sums stay in VMEM from block to block (online softmax).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # statistics are kept in full lanes
_QUERIES = 512  # of a block, all heads of a group
_KEYS = 512  # of a block


def attend(
    q_NTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    rows_N: jax.Array,
    start_N: jax.Array,
    count_N: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """As `prefill_attention`; `interpret` runs it as plain operations on any platform."""
    n, queries, heads, width = q_NTHh.shape
    b, kv_heads, keys = k_BKSh.shape[:3]
    group = heads // kv_heads
    tile = 8 * 4 // q_NTHh.dtype.itemsize  # rows that a block's heads begin at a multiple of
    # A power of two, since the place of a query in its head is then a few bits.
    block_q = max(tile, pl.next_power_of_2(queries))
    while block_q > tile and block_q * group > _QUERIES:
        block_q //= 2
    padded = pl.cdiv(queries, block_q) * block_q
    key_tile = 8 * 4 // k_BKSh.dtype.itemsize
    block_k = min(_KEYS, pl.cdiv(keys, key_tile) * key_tile)

    def first_block(start, i):
        """Of the keys that the block of queries sees."""
        if window is None:
            return 0
        first = jnp.maximum(start + i * block_q + 1 - window, 0)
        return lax.div(jnp.minimum(first, keys - 1), block_k)

    def last_block(start, count, i):
        last = start + jnp.minimum((i + 1) * block_q, jnp.maximum(count, 1)) - 1
        return lax.div(jnp.clip(last, 0, keys - 1), block_k)

    def of_keys(piece, head, i, j, rows, start, count):
        first, last = first_block(start[piece], i), last_block(start[piece], count[piece], i)
        # Blocks of queries that do not matter may name a last block before the first.
        return jnp.clip(rows[piece], 0, b - 1), head, jnp.minimum(jnp.maximum(j, first), last), 0

    def of_queries(piece, head, i, j, *_):
        return piece, head, 0, i, 0

    def kernel(rows, start, count, q_GTh, k_Sh, v_Sh, out_GTh, max_QL, sum_QL, acc_Qh):
        piece, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        first, last = first_block(start[piece], i), last_block(start[piece], count[piece], i)

        @pl.when(j == 0)
        def _():
            max_QL[...] = jnp.full_like(max_QL, -jnp.inf)
            sum_QL[...] = jnp.zeros_like(sum_QL)
            acc_Qh[...] = jnp.zeros_like(acc_Qh)

        @pl.when((i * block_q < count[piece]) & (j >= first) & (j <= last))
        def _():
            q_Qh = q_GTh[...].reshape(group * block_q, width)
            scores_QS = scale * _dot(q_Qh, k_Sh[...], contract=(1, 1))
            if softcap is not None:
                scores_QS = softcap * jnp.tanh(scores_QS / softcap)
            query_QS = _iota(scores_QS.shape, 0) & (block_q - 1)
            position_QS = start[piece] + i * block_q + query_QS
            key_QS = j * block_k + _iota(scores_QS.shape, 1)
            visible_QS = (key_QS <= position_QS) & (key_QS < keys)
            if window is not None:
                visible_QS &= key_QS > position_QS - window
            scores_QS = jnp.where(visible_QS, scores_QS, -jnp.inf)
            before_Q1 = max_QL[:, :1]
            top_Q1 = jnp.maximum(before_Q1, jnp.max(scores_QS, axis=1, keepdims=True))
            # A query may see nothing of this block.
            base_Q1 = jnp.where(top_Q1 == -jnp.inf, 0.0, top_Q1)
            mass_QS = jnp.exp(scores_QS - base_Q1)
            shrink_Q1 = jnp.exp(before_Q1 - base_Q1)
            # What lies behind the cache's end is not ours: zero, since 0 * NaN is NaN.
            inside_Sh = j * block_k + _iota((block_k, width), 0) < keys
            values_Sh = jnp.where(inside_Sh, v_Sh[...], 0)
            added_Qh = _dot(mass_QS.astype(values_Sh.dtype), values_Sh, contract=(1, 0))
            total_Q1 = shrink_Q1 * sum_QL[:, :1] + jnp.sum(mass_QS, axis=1, keepdims=True)
            acc_Qh[...] = shrink_Q1 * acc_Qh[...] + added_Qh
            sum_QL[...] = jnp.broadcast_to(total_Q1, sum_QL.shape)
            max_QL[...] = jnp.broadcast_to(top_Q1, max_QL.shape)

        @pl.when(j == pl.num_programs(3) - 1)
        def _():
            total_Q1 = sum_QL[:, :1]
            out_Qh = acc_Qh[...] / jnp.where(total_Q1 == 0, 1.0, total_Q1)
            out_GTh[...] = out_Qh.reshape(out_GTh.shape).astype(out_GTh.dtype)

    if not interpret:
        # Or XLA moves caches that VMEM has room for there and back, whole.
        k_BKSh, v_BKSh = (
            pltpu.with_memory_space_constraint(cache, pltpu.HBM) for cache in (k_BKSh, v_BKSh)
        )
    q_NKGTh = jnp.pad(q_NTHh, ((0, 0), (0, padded - queries), (0, 0), (0, 0)))
    q_NKGTh = q_NKGTh.reshape(n, padded, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    of_one_head = pl.BlockSpec((None, None, group, block_q, width), of_queries)
    of_one_row = pl.BlockSpec((None, None, block_k, width), of_keys)
    statistics = pltpu.VMEM((group * block_q, _LANES), jnp.float32)
    out_NKGTh = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q_NKGTh.shape, q_NTHh.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(n, kv_heads, padded // block_q, pl.cdiv(keys, block_k)),
            in_specs=[of_one_head, of_one_row, of_one_row],
            out_specs=of_one_head,
            scratch_shapes=[
                statistics,
                statistics,
                pltpu.VMEM((group * block_q, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q_NTHh, k_BKSh, keys if window is None else min(window, keys)),
        interpret=interpret,
        name="prefill_attention",
    )(*(x.astype(jnp.int32) for x in (rows_N, start_N, count_N)), q_NKGTh, k_BKSh, v_BKSh)
    out_NTKGh = out_NKGTh.transpose(0, 3, 1, 2, 4)[:, :queries]
    return out_NTKGh.reshape(q_NTHh.shape)


def _cost(q_NTHh: jax.Array, k_BKSh: jax.Array, visible: int) -> pl.CostEstimate:
    """Of queries that see so many keys each: all of them, since their positions are not known."""
    n, queries, heads, width = q_NTHh.shape
    cached = 2 * n * k_BKSh.shape[1] * visible * width * k_BKSh.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * n * queries * heads * visible * width,
        transcendentals=n * queries * heads * visible,
        bytes_accessed=cached + 2 * q_NTHh.size * q_NTHh.dtype.itemsize,
    )


_iota = functools.partial(lax.broadcasted_iota, jnp.int32)


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
