"""The sampler for TPU: one Pallas kernel that reads the logits once, in 8 or 16 rows at a time.

The grid is (blocks of rows, pieces of the vocabulary). While the next piece is copied in, a piece
goes through a loop over its cells for their pairs (one pair a cell where all rows of the block are
at temperature 1 and there is no mask, else two) and, if a row of the block is filtered, through the
tournament. Clean logits stay in VMEM, so that the last piece can end with the draw: it reads one
more cell of each row, or the candidates, or, if a row's candidates were not enough, takes the exact
passes over whole rows, from VMEM again. HBM is read once in every case.

A vocabulary that is small or has more cells than lanes goes to the XLA form.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxconv_kernels.sampling import spec, tpu_finish, xla
from jaxconv_kernels.sampling.cells import Mass, finite
from jaxconv_kernels.sampling.finish import Kept
from jaxconv_kernels.sampling.spec import BINS, CELL, LANES, LEVELS, RowParameters, Sampled
from jaxconv_kernels.sampling.tpu_finish import TOGETHER, Found, Number
from jaxconv_kernels.sampling.tpu_vectors import (
    lane_ids,
    lane_sum,
    put,
    row_max,
    settled,
    spread,
    vectors,
    widen,
)

_CELLS_A_PIECE = 32  # 2 MiB of float32 in 8 rows: the copy outlasts the start of a grid step
_BINS_AT_ONCE = 256  # whose levels stay in registers
_SCALED, _FILTERED = 1, 2  # of a block: some row is not at temperature 1, is filtered


def sample(
    logits: jax.Array,
    keys_B2: jax.Array,
    parameters: RowParameters,
    mask: jax.Array | None,
    *,
    interpret: bool = False,
) -> Sampled:
    """As `xla.sample`.

    Args:
        interpret: run it as plain operations on any platform.
    """
    rows, vocab = logits.shape
    if spec.is_small(vocab) or vocab > CELL * LANES:
        return xla.sample(logits, keys_B2, parameters, mask)
    height = 32 // logits.dtype.itemsize  # rows of a tile
    blocks, cells = pl.cdiv(rows, height), pl.cdiv(vocab, CELL)
    pieces = pl.cdiv(cells, _CELLS_A_PIECE)
    per_piece = TOGETHER * pl.cdiv(cells, TOGETHER * pieces)
    width = per_piece * CELL

    numbers, flags = _numbers(keys_B2, parameters, height)
    arrays = [numbers, logits]
    row = pl.BlockSpec((height, LANES), lambda block, piece, flags: (block, 0))
    specs = [row, pl.BlockSpec((height, width), lambda block, piece, flags: (block, piece))]
    if mask is not None:
        arrays.append(_by_lane(mask, pieces * width))
        specs.append(
            pl.BlockSpec((height, width // 32), lambda block, piece, flags: (block, piece))
        )
    of_cells = pltpu.VMEM((height, LANES), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, vocab=vocab, pieces=pieces, masked=mask is not None),
        out_shape=jax.ShapeDtypeStruct((blocks * height, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, pieces),
            in_specs=specs,
            out_specs=row,
            scratch_shapes=[
                pltpu.VMEM((height, pieces * width), logits.dtype),
                of_cells,
                of_cells,
                of_cells,
                of_cells,
                pltpu.VMEM((LEVELS, height, BINS), jnp.float32),
                pltpu.VMEM((LEVELS, height, BINS), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # Of rows that are filtered and have what they need after one reading.
        cost_estimate=pl.CostEstimate(
            flops=16 * rows * vocab,
            transcendentals=2 * rows * vocab,
            bytes_accessed=rows * vocab * logits.dtype.itemsize,
        ),
        interpret=interpret,
        name="sample",
    )
    return _sampled(call(flags, *arrays)[:rows], parameters)


def _kernel(flags, numbers, logits, *refs, vocab: int, pieces: int, masked: bool):
    mask = refs[0] if masked else None
    found, kept_x, raw_largest, raw_sum, largest, sums, top_x, top_slab = refs[masked:]
    piece, per_piece = pl.program_id(1), logits.shape[1] // CELL
    flag = flags[pl.program_id(0)]
    first = piece * per_piece  # cell of the piece
    cells = jnp.minimum(pl.cdiv(vocab, CELL) - first, per_piece)
    groups = lax.div(cells + TOGETHER - 1, TOGETHER)
    last = piece == pieces - 1

    def number(lane, dtype=jnp.int32):
        return lax.bitcast_convert_type(spread(numbers[:, lane : lane + 1]), dtype)

    def of_cell(i):
        return pl.ds(pl.multiple_of(i * CELL, CELL), CELL)

    def read(i):
        """Clean logits of a cell of the piece. Behind the end of the row is whatever was there."""
        x = spec.clean(logits[:, of_cell(i)])
        return jnp.where(lane_ids(*x.shape) < vocab - (first + i) * CELL, x, -jnp.inf)

    def pair(i, x, scale, largest, sums):
        top = row_max(x)
        mass = jnp.exp((x - widen(finite(top), x)) * widen(scale, x))
        put(largest, first + i, top)
        put(sums, first + i, lane_sum(spec.sum_of_rows(vectors(mass))))

    def for_cells(body):
        def group(g, _):
            for i in range(TOGETHER):
                body(g * TOGETHER + i, i)

        lax.fori_loop(0, groups, group, None)

    scale = number(Number.SCALE, jnp.float32)

    @pl.when(piece == 0)
    def _():
        for ref in (raw_largest, largest, top_x):
            ref[...] = jnp.full_like(ref, -jnp.inf)
        for ref in (raw_sum, sums, top_slab):
            ref[...] = jnp.zeros_like(ref)

    def pairs(i, place, *, raw: bool):
        given = x = read(i)
        if masked:
            at = pl.multiple_of((i - place % 2) * (LANES // 2), LANES)
            words, first_bit = mask[:, pl.ds(at, LANES)], place % 2 * (CELL // LANES)
            bits = [words << 31 - bit for bit in range(first_bit, first_bit + CELL // LANES)]
            x = settled(jnp.where(jnp.concatenate(bits, axis=1) < 0, x, -jnp.inf))
        kept_x[:, of_cell(first + i)] = x.astype(kept_x.dtype)
        pair(i, x, scale, largest, sums)
        if raw:
            pair(i, given, jnp.ones_like(scale), raw_largest, raw_sum)

    if masked:
        for_cells(functools.partial(pairs, raw=True))
    else:
        tempered = (flag & _SCALED) != 0

        @pl.when(tempered)
        def _():
            for_cells(functools.partial(pairs, raw=True))

        @pl.when(~tempered)
        def _():
            for_cells(functools.partial(pairs, raw=False))
            raw_largest[...] = largest[...]
            raw_sum[...] = sums[...]

    @pl.when((flag & _FILTERED) != 0)
    def _():
        start = piece * (per_piece // TOGETHER)
        for bins in range(0, BINS, _BINS_AT_ONCE):
            _tournament(kept_x, top_x, top_slab, bins, start, start + groups)

    pl.when(last)(
        lambda: tpu_finish.finish(
            found,
            number,
            vocab=vocab,
            any_filtered=(flag & _FILTERED) != 0,
            x=kept_x,
            pairs=(largest[...], sums[...]),
            raw_pairs=(raw_largest[...], raw_sum[...]),
            top=(top_x, top_slab),
        )
    )


def _tournament(x, top_x, top_slab, first_bin, start, stop):
    """Enters the cells of the groups from `start` to `stop` into a few of the bins."""
    slabs = CELL // BINS * TOGETHER
    bins = pl.ds(first_bin, _BINS_AT_ONCE)

    def insert(group, levels):
        for i in range(slabs):
            slab = group * slabs + i
            at = pl.multiple_of(slab * BINS + first_bin, _BINS_AT_ONCE)
            logit = x[:, pl.ds(at, _BINS_AT_ONCE)].astype(jnp.float32)
            levels = settled(_inserted((logit, jnp.full(logit.shape, slab)), levels))
        return levels

    levels = [(top_x[level, :, bins], top_slab[level, :, bins]) for level in range(LEVELS)]
    levels = lax.fori_loop(start, stop, insert, levels)
    for level, (logit, slab) in enumerate(levels):
        top_x[level, :, bins] = logit
        top_slab[level, :, bins] = slab


def _inserted(new, levels):
    """Levels (logit, slab) of bins, in descending order, after one more slab; a logit comes behind
    its equals, which are of earlier slabs.
    """
    above = [new[0] > logit for logit, _ in levels]
    out = [_select(above[0], new, levels[0])]
    for i in range(1, LEVELS):
        pushed = _select(above[i - 1], levels[i - 1], new)
        out.append(_select(above[i], pushed, levels[i]))
    return out


def _select(where, these, those):
    return jax.tree.map(lambda this, that: jnp.where(where, this, that), these, those)


def _numbers(keys_B2, parameters: RowParameters, height: int) -> tuple[jax.Array, jax.Array]:
    """(`Number`s of whole blocks of rows, flags of each block)."""

    def bits(x):
        return lax.bitcast_convert_type(x, jnp.int32)

    filtered = parameters.filtered
    columns = (
        bits(keys_B2[:, 0]),
        bits(keys_B2[:, 1]),
        bits(parameters.scale),
        bits(parameters.top_p),
        bits(parameters.min_p_margin),
        parameters.top_k,
        parameters.greedy.astype(jnp.int32),
        filtered.astype(jnp.int32),
    )
    numbers = jnp.stack(columns, axis=1)
    missing = -len(numbers) % height
    numbers = jnp.pad(numbers, ((0, missing), (0, LANES - len(columns))))
    flags = jnp.where(parameters.scale != 1, _SCALED, 0) + jnp.where(filtered, _FILTERED, 0)
    by_block = jnp.pad(flags, (0, missing)).reshape(-1, height)
    return numbers, functools.reduce(jnp.bitwise_or, list(by_block.T))


def _by_lane(mask: jax.Array, width: int) -> jax.Array:
    """The mask with bit k of word (two cells q, lane l), int32 [B, width / 32], for token
    4096 q + 128 k + l: what is a bit along lanes is then a bit along vectors.
    """
    rows, words = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, width // 32 - words))).reshape(rows, -1, 32, 4, 1)
    bits = (mask >> jnp.arange(32, dtype=jnp.uint32)) & 1
    place = jnp.arange(32, dtype=jnp.uint32).reshape(32, 1, 1)
    by_lane = jnp.sum(bits << place, axis=2, dtype=jnp.uint32)
    return lax.bitcast_convert_type(by_lane, jnp.int32).reshape(rows, -1)


def _sampled(found_BL: jax.Array, parameters: RowParameters) -> Sampled:
    def of(lane):
        return found_BL[:, lane]

    row = Mass(of(Found.LARGEST), finite(of(Found.LARGEST)), of(Found.TOTAL))
    raw_row = Mass(of(Found.RAW_LARGEST), finite(of(Found.RAW_LARGEST)), of(Found.RAW_TOTAL))
    kept = Kept(of(Found.THRESHOLD), of(Found.TOP_K_THRESHOLD), of(Found.KEPT))
    token_B = jnp.where(jnp.isneginf(row.largest), 0, of(Found.TOKEN).astype(jnp.int32))
    fallback_B = of(Found.FALLBACK) > 0
    return xla.report(token_B, of(Found.LOGIT), row, raw_row, parameters, kept, fallback_B)
