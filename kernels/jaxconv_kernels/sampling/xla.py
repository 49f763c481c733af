"""The sampler in plain XLA operations, without a sort; the form for CPUs, and for any platform
without a kernel.

`statistics` reads the logits, in one piece or in several that `merge` joins; `draw` finishes from
what it found and re-reads only a cell a row, unless a row's candidates were not enough.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_kernels.sampling import cells, fallback, finish, noise, spec, tournament
from jaxconv_kernels.sampling.axis import Axis
from jaxconv_kernels.sampling.cells import Cells, Mass
from jaxconv_kernels.sampling.mask import allowed_at, pack_mask, unpack_mask
from jaxconv_kernels.sampling.spec import CELL, RowParameters, Sampled
from jaxconv_kernels.sampling.tournament import Candidates

_ALONE = Axis()
_AT_ONCE = 1 << 21  # logits of a block of rows: several passes then find them in a cache


class Statistics(NamedTuple):
    """What one reading of a piece of the vocabulary leaves.

    Attributes:
        raw: cells of the logits as given, at temperature 1.
        tempered: cells of the allowed logits at the row's temperature.
        candidates: of the filtered rows; None in a small vocabulary.
    """

    raw: Cells
    tempered: Cells
    candidates: Candidates | None


def sample(
    logits: jax.Array,
    keys_B2: jax.Array,
    parameters: RowParameters,
    mask: jax.Array | None,
    *,
    axis: Axis = _ALONE,
    multipass: bool = False,
) -> Sampled:
    """Samples rows [B, V]; over an axis, V is this device's piece of the vocabulary.

    Args:
        logits: float32 or bfloat16 [B, V].
        keys_B2: uint32, threefry key data.
        parameters: of the rows.
        mask: uint32 [B, ceil(V / 32)], packed, or None.
        axis: the devices that share the vocabulary.
        multipass: every filtered row of a vocabulary that is not small takes the fallback.
    """
    piece = logits.shape[1]
    vocab = piece * axis.size()
    if spec.is_small(vocab) and axis.name is not None:
        # The logits are fewer than the candidates would be.
        mask = None if mask is None else pack_mask(axis.concatenate(unpack_mask(mask, piece)))
        logits, axis = axis.concatenate(logits), _ALONE
    found = statistics(logits, axis.index() * piece, parameters, mask, vocab=vocab)
    if axis.name is not None:
        raw, tempered = (Cells(*map(axis.concatenate, c)) for c in (found.raw, found.tempered))
        candidates = jax.lax.cond(
            jnp.any(parameters.filtered),  # on every device the same
            lambda: tournament.merge(
                [Candidates(*(axis.concatenate(x, 1) for x in found.candidates))]
            ),
            lambda: tournament.no_candidates(len(logits)),
        )
        found = Statistics(raw, tempered, candidates)
    return draw(found, logits, keys_B2, parameters, mask, axis=axis, multipass=multipass)


def statistics(
    logits: jax.Array,
    first_id: jax.Array | int,
    parameters: RowParameters,
    mask: jax.Array | None = None,
    *,
    vocab: int,
) -> Statistics:
    """Reads a piece of the vocabulary.

    Args:
        logits: float32 or bfloat16 [B, N].
        first_id: token of the first column, a multiple of CELL.
        parameters: of the rows.
        mask: uint32 [B, ceil(N / 32)], packed, of the piece, or None.
        vocab: size of the whole vocabulary. A small one is read in one piece. Of a larger one every
            piece but the last has a multiple of CELL columns.
    """
    small = spec.is_small(vocab)

    def read(logits_RV, parameters_R, mask_RW):
        x_raw = spec.clean(logits_RV)
        x = cells.by_cell(_masked(x_raw, mask_RW), small)
        largest = cells.cell_largest(x)
        plain_R = jnp.ones_like(parameters_R.scale)

        tempered = cells.statistics(x, largest, parameters_R.scale)
        if mask_RW is None:
            # This way round, a caller without use for `logprob_raw` never pays for it.
            raw = jax.lax.cond(
                jnp.any(parameters_R.scale != 1),
                lambda: cells.statistics(x, largest, plain_R),
                lambda: tempered,
            )
        else:
            x_raw = cells.by_cell(x_raw, small)
            raw = cells.statistics(x_raw, cells.cell_largest(x_raw), plain_R)
        if small:
            return Statistics(raw, tempered, None)
        rows = len(logits_RV)
        candidates = jax.lax.cond(
            jnp.any(parameters_R.filtered),
            lambda: tournament.tournament(x.reshape(rows, -1), first_id),
            lambda: tournament.no_candidates(rows),
        )
        return Statistics(raw, tempered, candidates)

    return _in_blocks(read, (logits, parameters, mask), 1 if small else logits.shape[1])


def merge(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of a vocabulary from those of its pieces in order: what `statistics` gives of
    the whole, to the bit.
    """
    raw, tempered, candidates = zip(*parts, strict=True)

    def join(pieces):
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *pieces)

    return Statistics(join(raw), join(tempered), tournament.merge(candidates))


def draw(
    found: Statistics,
    logits: jax.Array,
    keys_B2: jax.Array,
    parameters: RowParameters,
    mask: jax.Array | None = None,
    *,
    axis: Axis = _ALONE,
    multipass: bool = False,
) -> Sampled:
    """Finishes rows from the statistics of the whole vocabulary; other arguments as of `sample`."""
    rows, piece = logits.shape
    first_id = axis.index() * piece
    small = found.candidates is None
    row, mass_BC = cells.merged(found.tempered, parameters.scale)
    raw_row, _ = cells.merged(found.raw, jnp.ones_like(parameters.scale))
    empty_B, infinite_B = jnp.isneginf(row.largest), jnp.isposinf(row.largest)
    certain_B = parameters.greedy | infinite_B | empty_B
    filtered_B = parameters.filtered & ~certain_B

    def read_rows(at_R):
        mask_R = None if mask is None else mask[at_R]
        return _masked(spec.clean(logits[at_R]), mask_R)

    def first_of_largest():
        ids = first_id + jnp.arange(piece, dtype=jnp.int32)
        x = _masked(spec.clean(logits), mask)
        return axis.least(cells.first_largest_at(x, row.largest, ids[None]))

    def draw_plain():
        cell_B = cells.draw_cell(mass_BC, keys_B2)
        x_BT, ids_BT, here_B = _read_cell(logits, mask, cell_B, axis, small=small)
        base_B = row.peak if small else cells.finite(_at(found.tempered.largest, cell_B))
        mass_BT = jnp.exp((x_BT - base_B[:, None]) * parameters.scale[:, None])
        noise_BT = noise.exponential(noise.bits(keys_B2, noise.TOKENS_IN_CELL, ids_BT))
        token_B = cells.first_largest(mass_BT / noise_BT, ids_BT)[1]
        return axis.sum(jnp.where(here_B, token_B, 0))

    nothing_kept = finish.Kept(row.peak, row.peak, row.total)

    def draw_filtered():
        on = parameters._replace(greedy=~filtered_B)
        if small:
            x = cells.by_cell(read_rows(jnp.arange(rows)), small=True)
            kept, z = finish.keep(x, row, on, add=spec.lane_sum)
            return finish.draw_kept(z, cells.token_ids(x), keys_B2)[1], kept, no_B
        if multipass:
            token_B, kept, todo_B = no_token_B, nothing_kept, filtered_B
        else:
            x, ids = (c.reshape(rows, -1, spec.LANES) for c in found.candidates)
            kept, z = finish.keep(x, row, on, add=spec.lane_sum, greatest=cells.greatest)
            token_B = finish.draw_kept(z, ids, keys_B2)[1]
            todo_B = filtered_B & ~finish.certified(kept, found.candidates.worst, on)
        token_B, kept = fallback.draw_exactly(
            read_rows, todo_B, row, on, keys_B2, token_B, kept, axis
        )
        return token_B, kept, todo_B

    def draw_other():
        """Tokens of the rows that are not plain."""
        token_B, kept, fallback_B = jax.lax.cond(jnp.any(filtered_B), draw_filtered, draw_nothing)
        largest_B = jax.lax.cond(jnp.any(certain_B), first_of_largest, lambda: no_token_B)
        return jnp.where(certain_B, largest_B, token_B), kept, fallback_B

    def draw_nothing():
        return no_token_B, nothing_kept, no_B

    no_token_B, no_B = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    plain_B = ~(filtered_B | certain_B)
    token_B = jax.lax.cond(jnp.any(plain_B), draw_plain, lambda: no_token_B)
    other_B, kept, fallback_B = jax.lax.cond(jnp.all(plain_B), draw_nothing, draw_other)
    token_B = jnp.where(empty_B, 0, jnp.where(plain_B, token_B, other_B))

    raw_B = spec.clean(_pick(logits, token_B - first_id, axis))
    return report(token_B, raw_B, row, raw_row, parameters, kept, fallback_B)


def report(
    token_B: jax.Array,
    raw_B: jax.Array,
    row: Mass,
    raw_row: Mass,
    parameters: RowParameters,
    kept: finish.Kept,
    fallback_B: jax.Array,
) -> Sampled:
    """All that is said of a draw.

    Args:
        token_B: int32, the tokens.
        raw_B: float32, their logits as given, NaN as -inf.
        row: mass of the allowed logits of the rows at their temperature.
        raw_row: mass of the logits as given at temperature 1.
        parameters: of the rows.
        kept: what was kept of filtered rows.
        fallback_B: bool, whether a filtered row took the fallback.
    """
    empty_B, infinite_B = jnp.isneginf(row.largest), jnp.isposinf(row.largest)
    certain_B = parameters.greedy | infinite_B | empty_B
    filtered_B = parameters.filtered & ~certain_B
    logprob_raw = jnp.where(
        jnp.isposinf(raw_row.largest),
        jnp.where(jnp.isposinf(raw_B), 0.0, -jnp.inf),
        raw_B - raw_row.peak - jnp.log(raw_row.total),
    )
    kept_B = jnp.where(filtered_B, kept.mass, row.total)
    processed_B = (raw_B - row.peak) * parameters.scale - jnp.log(kept_B)
    threshold_B = jnp.where(filtered_B, kept.threshold, -jnp.inf)
    flags = (
        (empty_B, spec.EMPTY),
        (parameters.greedy, spec.GREEDY),
        (infinite_B, spec.INFINITE),
        (filtered_B, spec.FILTERED),
        (fallback_B & filtered_B, spec.FALLBACK),
    )
    return Sampled(
        token=token_B,
        logprob_raw=jnp.where(empty_B, -jnp.inf, logprob_raw),
        logprob_processed=jnp.where(certain_B, jnp.where(empty_B, -jnp.inf, 0.0), processed_B),
        threshold=jnp.where(certain_B, row.largest, threshold_B),
        kept_mass=jnp.where(
            filtered_B,
            jnp.minimum(kept_B / row.total, 1.0),
            jnp.where(empty_B, 0.0, 1.0),
        ),
        flags=sum(jnp.where(on_B, flag, 0) for on_B, flag in flags),
    )


def _masked(x_BV: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return x_BV
    return jnp.where(unpack_mask(mask, x_BV.shape[1]), x_BV, -jnp.inf)


def _in_blocks(read, arrays, width: int):
    """Applies `read` to blocks of rows, which all have the same number of rows.

    The last block may begin before the one before it ends, rather than be padded, for that would
    copy all logits; its first rows are then left out of the result.
    """
    rows = len(arrays[0])
    block = 1 << max(0, (_AT_ONCE // width).bit_length() - 1)
    if rows <= block:
        return read(*arrays)
    starts = np.minimum(np.arange(0, rows, block), rows - block)

    def one(start):
        return read(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), arrays))

    stacked = jax.lax.map(one, jnp.asarray(starts, jnp.int32))
    kept = block * (rows // block)

    def join(x):
        whole = x.reshape(-1, *x.shape[2:])
        return jnp.concatenate([whole[:kept], whole[len(whole) - (rows - kept) :]])

    return jax.tree.map(join, stacked)


def _read_cell(logits, mask, cell_B, axis: Axis, *, small: bool):
    """(logits, ids, whether this device holds the cell) of a cell a row: [B, T], [B, T], [B]."""
    rows, piece = logits.shape
    if small:
        tokens = -(-piece // spec.SMALL_LANES)
        # Rounded up: what a vector does not fill would be done number by number.
        ids_T = spec.SMALL_LANES * jnp.arange(tokens + -tokens % 16, dtype=jnp.int32)
        at_BT, here_B = ids_T + cell_B[:, None], jnp.ones(rows, bool)
        inside = at_BT < piece
        x_BT = jnp.take_along_axis(logits, jnp.minimum(at_BT, piece - 1), axis=1)
    else:
        first_B = cell_B * CELL - axis.index() * piece
        here_B = (first_B >= 0) & (first_B < piece)
        # The last cell may be short: then its reading starts in the cell before.
        start_B = jnp.clip(first_B, 0, piece - CELL)
        x_BT = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, CELL))(
            logits, start_B
        )
        at_BT = start_B[:, None] + jnp.arange(CELL, dtype=jnp.int32)
        inside = at_BT >= first_B[:, None]
    if mask is not None:
        inside &= allowed_at(mask, at_BT)
    x_BT = jnp.where(inside, spec.clean(x_BT), -jnp.inf)
    return x_BT, at_BT + axis.index() * piece, here_B


def _pick(logits, at_B, axis: Axis):
    """The logit [B] at a column of each row, from the device that holds it."""
    here_B = (at_B >= 0) & (at_B < logits.shape[1])
    x_B = _at(logits, jnp.clip(at_B, 0, logits.shape[1] - 1)).astype(jnp.float32)
    return axis.sum(jnp.where(here_B, x_B, 0.0))


def _at(x_BN, at_B):
    return jnp.take_along_axis(x_BN, at_B[:, None], axis=1)[:, 0]
