"""Stage A in Mosaic GPU: one reading of the logits, for NVIDIA GPUs of the Hopper class.

A program reads the cells of one row, or of a part of it, which TMA brings while those before are at
work. A thread is a lane: it holds every 128th token, so a cell is 16 vectors of 128, and the bins
of the tournament stay in the registers of their thread.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxconv_kernels.sampling.spec import BINS, CELL, LANES, LEVELS, NO_TOKEN, sum_of_rows

ROWS = CELL // LANES  # vectors of a cell
SLAB = BINS // LANES  # vectors of the bins
_SEGMENT = LANES // 2  # cells whose sums are finished at once, a thread for each of their two sums
_STAGES = 4  # cells on their way or at work

# In this semantics a reference may be read along any axis, in every version from 0.10.2 on.
PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


class Reading(NamedTuple):
    """What the reading of rows of C cells leaves.

    Attributes:
        largest: float32 [B, 2, N], of the cells of the logits as given and of those allowed; cells
            fill up to N, a multiple of 128, with -inf.
        sum: float32 [B, 2, N], sum over the cell of exp(x - largest) of the logits as given, and of
            exp((x - largest) * scale) of those allowed; 0 from C on.
        logit: float32 [B, parts, LEVELS, SLAB, 128], candidates of each part of a filtered row.
        token: int32, likewise, ids of the candidates.
    """

    largest: jax.Array
    sum: jax.Array
    logit: jax.Array
    token: jax.Array


def read(
    logits_BRL: jax.Array,
    allowed_BCL: jax.Array | None,
    scale_B: jax.Array,
    filtered_B: jax.Array,
    *,
    parts: int,
    interpret=None,
) -> Reading:
    """Reads rows once.

    Args:
        logits_BRL: float32 or bfloat16 [B, V / 128, 128].
        allowed_BCL: int32 [B, C, 128], bit r of lane l of cell c set where token 2048 c + 128 r + l
            is allowed; None allows all.
        scale_B: float32, 1 / temperature.
        filtered_B: int32, 1 where the row needs candidates; elsewhere they are left undefined.
        parts: programs that share a row.
        interpret: Pallas's parameters for running it as plain operations on a CPU.
    """
    b, vectors, _ = logits_BRL.shape
    cells = pl.cdiv(vectors, ROWS)
    share = pl.cdiv(cells, parts)
    parts = pl.cdiv(cells, share)
    segments = pl.cdiv(share, _SEGMENT)

    def kernel(*refs):
        logits_BRL, *refs = refs
        allowed_BCL = refs.pop(0) if masked else None
        scale_B, filtered_B, largest_BPGL, sum_BPGL, logit_BPTSL, token_BPTSL, lanes_smem = refs
        part, row = (lax.axis_index(name) for name in ("part", "row"))
        first = part * share
        scale = scale_B[row]
        lane_L = iota()
        bins = (SLAB, LANES)
        bin_SL = iota(bins, 0) * LANES + iota(bins, 1)

        def read_cell(step, x_smem, allowed_smem, largest_L):
            """Leaves a cell's sums by lane; gives `largest` with that of the cell in its lanes."""
            cell, slot = first + step, lax.rem(step, _SEGMENT)
            raw = [clean(x_smem[r], cell * ROWS + r < vectors) for r in range(ROWS)]
            allowed = raw
            if masked:
                word_L = allowed_smem[...]
                allowed = [
                    jnp.where((word_L >> r) & 1 == 1, x_L, -jnp.inf) for r, x_L in enumerate(raw)
                ]
            top = jnp.max(functools.reduce(jnp.maximum, allowed))
            raw_top = jnp.max(functools.reduce(jnp.maximum, raw)) if masked else top

            base = finite(top)
            tempered_L = sum_of_rows([jnp.exp((x_L - base) * scale) for x_L in allowed])
            lanes_smem[slot + _SEGMENT, pl.ds(0, LANES)] = tempered_L

            def plain():
                base = finite(raw_top)
                plain_L = sum_of_rows([jnp.exp(x_L - base) for x_L in raw])
                lanes_smem[slot, pl.ds(0, LANES)] = plain_L

            def same():
                lanes_smem[slot, pl.ds(0, LANES)] = tempered_L

            if masked:
                plain()
            else:
                pl.when(scale != 1)(plain)
                pl.when(scale == 1)(same)
            largest_L = jnp.where(lane_L == slot, raw_top, largest_L)
            largest_L = jnp.where(lane_L == slot + _SEGMENT, top, largest_L)

            def finish():
                in_use_L = (lane_L & (_SEGMENT - 1)) <= slot
                at = (row, part, step // _SEGMENT)
                sum_BPGL[at] = jnp.where(in_use_L, by_halves(lanes_smem, 0, 1), 0.0)
                largest_BPGL[at] = jnp.where(in_use_L, largest_L, -jnp.inf)

            pl.when((slot == _SEGMENT - 1) | (step == share - 1))(finish)
            return largest_L

        def pipeline(body, carry):
            def at_step(indices, *refs):
                *refs, carry = refs
                return body(indices[0], refs[0], refs[1] if masked else None, carry)

            def at_cell(step):
                # The last part may have steps past the last cell, which then count for nothing.
                return row, jnp.minimum(first + step, cells - 1), 0

            specs = [
                plgpu.BlockSpec((None, ROWS, LANES), at_cell),
                plgpu.BlockSpec((None, None, LANES), at_cell),
            ]
            run = plgpu.emit_pipeline(
                at_step,
                grid=(share,),
                in_specs=specs[: 1 + masked],
                max_concurrent_steps=_STAGES,
                init_carry=carry,
            )
            return run(*[logits_BRL, allowed_BCL][: 1 + masked])

        def with_candidates():
            def body(step, x_smem, allowed_smem, carry):
                largest_L, levels = carry
                largest_L = read_cell(step, x_smem, allowed_smem, largest_L)
                for r in range(0, ROWS, SLAB):
                    token_SL = bin_SL + ((first + step) * CELL + r * LANES)
                    x_SL = plgpu.layout_cast(x_smem[pl.ds(r, SLAB)], layout(bins))
                    x_SL = clean(x_SL, token_SL < vectors * LANES)
                    if masked:
                        word_SL = lax.broadcast_in_dim(allowed_smem[...], bins, [1])
                        row_SL = (bin_SL >> 7) + r
                        x_SL = jnp.where((word_SL >> row_SL) & 1 == 1, x_SL, -jnp.inf)
                    levels = insert(levels, x_SL, token_SL)
                return largest_L, levels

            empty = [(full(-jnp.inf, bins), full(NO_TOKEN, bins)) for _ in range(LEVELS)]
            _, levels = pipeline(body, (full(-jnp.inf), empty))
            for level, (x_SL, token_SL) in enumerate(levels):
                logit_BPTSL[row, part, level] = x_SL
                token_BPTSL[row, part, level] = token_SL

        def without_candidates():
            def body(step, x_smem, allowed_smem, largest_L):
                return read_cell(step, x_smem, allowed_smem, largest_L)

            pipeline(body, full(-jnp.inf))

        filtered = filtered_B[row] != 0
        pl.when(filtered)(with_candidates)
        pl.when(~filtered)(without_candidates)

    masked = allowed_BCL is not None
    of_cells = jax.ShapeDtypeStruct((b, parts, segments, LANES), jnp.float32)
    candidates = (b, parts, LEVELS, SLAB, LANES)
    run = plgpu.kernel(
        kernel,
        out_type=(
            of_cells,
            of_cells,
            jax.ShapeDtypeStruct(candidates, jnp.float32),
            jax.ShapeDtypeStruct(candidates, jnp.int32),
        ),
        # The odd row length keeps a column's elements in different banks.
        scratch_types=[plgpu.SMEM((LANES, LANES + 1), jnp.float32)],
        grid=(parts, b),
        grid_names=("part", "row"),
        compiler_params=PARAMETERS,
        interpret=interpret,
    )
    arrays = (logits_BRL, allowed_BCL, scale_B, filtered_B)
    largest, sums, logit, token = run(*[x for x in arrays if x is not None])

    def in_cell_order(x_BPGL, fill):
        x = x_BPGL.reshape(b, parts, segments, 2, _SEGMENT).transpose(0, 3, 1, 2, 4)
        x = x.reshape(b, 2, parts, -1)[..., :share].reshape(b, 2, -1)[..., :cells]
        return jnp.pad(x, ((0, 0), (0, 0), (0, -cells % LANES)), constant_values=fill)

    return Reading(in_cell_order(largest, -jnp.inf), in_cell_order(sums, 0.0), logit, token)


def insert(levels: list, x_L: jax.Array, token_L: jax.Array) -> list:
    """The levels [(logit, token), …], descending, with x in its place; behind its equals."""
    above = [x_L > logit_L for logit_L, _ in levels]
    placed = [_pick(above[0], (x_L, token_L), levels[0])]
    for i in range(1, len(levels)):
        moved = _pick(above[i - 1], levels[i - 1], (x_L, token_L))
        placed.append(_pick(above[i], moved, levels[i]))
    return placed


def clean(x_L: jax.Array, inside: jax.Array) -> jax.Array:
    """float32 with -inf for NaN, and outside of the vocabulary."""
    x_L = x_L.astype(jnp.float32)
    return jnp.where(inside & (x_L == x_L), x_L, -jnp.inf)


def finite(x: jax.Array) -> jax.Array:
    """0 for infinities."""
    return jnp.where((x == jnp.inf) | (x == -jnp.inf), 0.0, x)


def by_halves(lanes_smem, lane: int, width: int) -> jax.Array:
    """What `spec.lane_sum` has in a lane once so many are left, a row of `lanes_smem` a thread."""
    if width == LANES:
        return lanes_smem[:, lane]
    half = [by_halves(lanes_smem, at, 2 * width) for at in (lane, lane + width)]
    return half[0] + half[1]


def layout(shape: tuple[int, ...]):
    """Neighbours along lanes in neighbouring threads."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def full(value, shape: tuple[int, ...] = (LANES,)) -> jax.Array:
    """An array of one value, in registers of its own."""
    dtype = jnp.int32 if isinstance(value, int) else jnp.float32
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout(shape))


def iota(shape: tuple[int, ...] = (LANES,), dimension: int = 0) -> jax.Array:
    """int32 indices along a dimension."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout(shape))


def _pick(condition_L, yes: tuple, no: tuple) -> tuple:
    return tuple(jnp.where(condition_L, y, n) for y, n in zip(yes, no, strict=True))
