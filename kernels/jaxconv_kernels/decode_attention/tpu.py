"""Decode attention for TPU: a row's keys stream through VMEM in blocks, those in use and no others.

The grid is (rows, blocks of keys). The positions are prefetched, so that the index map of a block
can name the last block in use again once a row has no more: Pallas copies a block only when its
index changes. Scores, maximum and sums are float32 and stay in VMEM from block to block (online
softmax), which starts from the row's own key and value.

These two are written into the cache here, as one tile of rows, whose other rows are in the last
block anyway. A scatter before the kernel would do, if XLA did not give the cache another layout for
it than the kernel reads: a loop of decode steps would copy the whole cache, there and back.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # statistics are kept in full lanes
_BLOCK_BYTES = 1 << 20  # of the keys of one block, all heads; four such are in flight


def write_and_attend(
    q_BHh: jax.Array,
    k_BKh: jax.Array,
    v_BKh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    position_B: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `decode_attention`.

    Args:
        block: keys of a block, a multiple of 128; None takes as many as fit.
        interpret: run it as plain operations on any platform.
    """
    b, heads, width = q_BHh.shape
    kv_heads, keys = k_BKSh.shape[1:3]
    group = heads // kv_heads
    tile = 8 * 4 // k_BKSh.dtype.itemsize  # rows that a store cannot divide
    if block is None:
        fits = _BLOCK_BYTES // (kv_heads * width * k_BKSh.dtype.itemsize)
        block = max(_LANES, min(1024, fits // _LANES * _LANES))
    if keys <= block:
        block = pl.cdiv(keys, tile) * tile

    # A query behind the cache's end looks back from the last key, and has none of its own.
    def place(position):
        return jnp.minimum(position, keys - 1)

    # `lax.div`, since `//` asks for the sign, whose lowering asks which chip it is for.
    def first_block(position):
        if window is None:
            return 0
        return lax.div(jnp.maximum(place(position) + 1 - window, 0), block)

    def last_block(position):
        return lax.div(place(position), block)

    def of_block(row, j, positions):
        position = positions[row]
        return row, 0, jnp.clip(j, first_block(position), last_block(position)), 0

    def of_tile(row, j, positions):
        return row, 0, lax.div(place(positions[row]), tile), 0

    def of_row(row, j, positions):
        return row, 0, 0, 0

    def kernel(positions, q_KGh, k_K1h, v_K1h, k_KSh, v_KSh, out_KGh, k_KRh, v_KRh, *scratch):
        max_KGL, sum_KGL, acc_KGh = scratch
        row, j = pl.program_id(0), pl.program_id(1)
        position = positions[row]

        def score(products):
            scores = scale * products
            return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

        @pl.when(j == 0)
        def _():
            has_own = position < keys
            for head in range(kv_heads):
                k_1h, v_1h = (x[head].astype(jnp.float32) for x in (k_K1h, v_K1h))
                products_Gh = q_KGh[head].astype(jnp.float32) * k_1h
                score_G1 = score(jnp.sum(products_Gh, axis=1, keepdims=True))
                score_G1 = jnp.where(has_own, score_G1, -jnp.inf)
                max_KGL[head] = jnp.broadcast_to(score_G1, (group, _LANES))
                acc_KGh[head] = jnp.broadcast_to(jnp.where(has_own, v_1h, 0.0), (group, width))
            sum_KGL[...] = jnp.full_like(sum_KGL, jnp.where(has_own, 1.0, 0.0))

        @pl.when((j >= first_block(position)) & (j <= last_block(position)))
        def _():
            old = jnp.minimum(position, keys)
            key_GS = j * block + _iota((group, block), 1)
            visible_GS = key_GS < old
            if window is not None:
                visible_GS &= key_GS > place(position) - window
            # What lies behind the cache's end is not ours: zero, since 0 * NaN is NaN.
            inside_Sh = j * block + _iota((block, width), 0) < old
            for head in range(kv_heads):
                scores_GS = score(_dot(q_KGh[head], k_KSh[head], contract=(1, 1)))
                scores_GS = jnp.where(visible_GS, scores_GS, -jnp.inf)
                before_G1 = max_KGL[head, :, :1]
                top_G1 = jnp.maximum(before_G1, jnp.max(scores_GS, axis=1, keepdims=True))
                # Where there is no own key, a block of the window's first row may hold none either.
                base_G1 = jnp.where(top_G1 == -jnp.inf, 0.0, top_G1)
                mass_GS = jnp.exp(scores_GS - base_G1)
                shrink_G1 = jnp.exp(before_G1 - base_G1)
                v_Sh = jnp.where(inside_Sh, v_KSh[head], 0)
                added_Gh = _dot(mass_GS.astype(v_Sh.dtype), v_Sh, contract=(1, 0))
                total_G1 = shrink_G1 * sum_KGL[head, :, :1] + jnp.sum(mass_GS, 1, keepdims=True)
                acc_KGh[head] = shrink_G1 * acc_KGh[head] + added_Gh
                sum_KGL[head] = jnp.broadcast_to(total_G1, (group, _LANES))
                max_KGL[head] = jnp.broadcast_to(top_G1, (group, _LANES))

        @pl.when(j == last_block(position))
        def _():
            within = lax.div(lax.rem(place(position), block), tile) * tile
            own_Rh = j * block + within + _iota((tile, width), 0) == position
            rows = pl.ds(pl.multiple_of(within, tile), tile)
            for new, cached, written in ((k_K1h, k_KSh, k_KRh), (v_K1h, v_KSh, v_KRh)):
                for head in range(kv_heads):
                    written[head] = jnp.where(own_Rh, new[head], cached[head, rows])

        @pl.when(j == pl.num_programs(1) - 1)
        def _():
            total_KG1 = sum_KGL[:, :, :1]
            out_KGh[...] = (acc_KGh[...] / jnp.where(total_KG1 == 0, 1.0, total_KG1)).astype(
                out_KGh.dtype
            )

    statistics = pltpu.VMEM((kv_heads, group, _LANES), jnp.float32)
    queries = pl.BlockSpec((None, kv_heads, group, width), of_row)
    own = pl.BlockSpec((None, kv_heads, 1, width), of_row)
    cached = pl.BlockSpec((None, kv_heads, block, width), of_block)
    written = pl.BlockSpec((None, kv_heads, tile, width), of_tile)
    call = pl.pallas_call(
        kernel,
        # Without HBM, XLA moves caches that VMEM has room for there and back, whole, at each step.
        out_shape=(
            jax.ShapeDtypeStruct((b, kv_heads, group, width), q_BHh.dtype),
            pltpu.HBM(k_BKSh.shape, k_BKSh.dtype),
            pltpu.HBM(v_BKSh.shape, v_BKSh.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(keys, block)),
            in_specs=[queries, own, own, cached, cached],
            out_specs=(queries, written, written),
            scratch_shapes=[
                statistics,
                statistics,
                pltpu.VMEM((kv_heads, group, width), jnp.float32),
            ],
        ),
        input_output_aliases={4: 1, 5: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q_BHh, k_BKSh, keys if window is None else min(window, keys)),
        interpret=interpret,
        name="decode_attention",
    )
    out_BKGh, k_BKSh, v_BKSh = call(
        position_B.astype(jnp.int32),
        q_BHh.reshape(b, kv_heads, group, width),
        k_BKh[:, :, None].astype(k_BKSh.dtype),
        v_BKh[:, :, None].astype(v_BKSh.dtype),
        k_BKSh,
        v_BKSh,
    )
    return out_BKGh.reshape(b, heads, width), k_BKSh, v_BKSh


def _cost(q_BHh: jax.Array, k_BKSh: jax.Array, visible: int) -> pl.CostEstimate:
    """Of rows that see so many keys each: all of them, since their positions are not known."""
    b, heads, width = q_BHh.shape
    cached = 2 * b * k_BKSh.shape[1] * visible * width * k_BKSh.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * b * heads * visible * width,
        transcendentals=b * heads * visible,
        bytes_accessed=cached + 2 * q_BHh.size * q_BHh.dtype.itemsize,
    )


_iota = functools.partial(lax.broadcasted_iota, jnp.int32)


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
