"""Stage A: the (largest, sum) pair of every cell of a row, and what is drawn from the pairs.

The pairs of chunks of a vocabulary concatenate to those of the whole, so a row may be read in one
piece, in several, or by several devices, to the same bits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling import noise, spec
from jaxconv_kernels.sampling.spec import CELL, LANES, SMALL_LANES, expand


class Cells(NamedTuple):
    """Statistics of the cells of rows.

    Attributes:
        largest: float32 [B, C], the largest logit of the cell, -inf where the cell is empty; in a
            small vocabulary [B, 1], the largest of the row.
        sum: float32 [B, C], sum over the cell of exp((x - largest) * scale); 0 where it is empty.
    """

    largest: jax.Array
    sum: jax.Array


class Mass(NamedTuple):
    """The mass of whole rows, [B] each.

    Attributes:
        largest: float32, m, the largest logit.
        peak: float32, m where it is finite, else 0: what logits are taken relative to.
        total: float32, Z, relative to the peak.
    """

    largest: jax.Array
    peak: jax.Array
    total: jax.Array


def by_cell(x_BV: jax.Array, small: bool) -> jax.Array:
    """Rows as [B, C, 16, 128], padded with -inf; of a small vocabulary as [B, tokens, 32]."""
    rows, vocab = x_BV.shape
    size = SMALL_LANES if small else CELL
    padded = jnp.pad(x_BV, ((0, 0), (0, -vocab % size)), constant_values=-jnp.inf)
    shape = (-1, SMALL_LANES) if small else (-1, CELL // LANES, LANES)
    return padded.reshape(rows, *shape)


def token_ids(cells: jax.Array, first_id: jax.Array | int = 0) -> jax.Array:
    """int32 ids of the tokens of `by_cell`, with a leading axis of one."""
    count = cells[0].size
    return (first_id + jnp.arange(count, dtype=jnp.int32)).reshape(1, *cells.shape[1:])


def cell_sum(values: jax.Array, *, computed: bool = False) -> jax.Array:
    """Sums numbers laid out by `by_cell` to one a cell, [B, C], as `spec.row_sum` does."""
    total = spec.row_sum if values.ndim == 3 else spec.lane_sum
    return total(values, computed=computed)


def cell_largest(x: jax.Array) -> jax.Array:
    """`largest` of the cells of rows laid out by `by_cell`."""
    if x.ndim == 3:
        return jnp.max(x.reshape(x.shape[0], -1), axis=-1, keepdims=True)
    return jnp.max(x, axis=(2, 3))


def statistics(x: jax.Array, largest: jax.Array, scale_B: jax.Array) -> Cells:
    """Pairs of the cells of rows that are laid out by `by_cell`."""
    base = finite(largest)[:, :, None] if x.ndim == 3 else finite(largest)[:, :, None, None]
    return Cells(largest, cell_sum(jnp.exp((x - base) * expand(scale_B, x)), computed=True))


def merged(cells: Cells, scale_B: jax.Array) -> tuple[Mass, jax.Array]:
    """(mass of the rows whose cells these are, all of them, in order; mass [B, C] of each cell)."""
    largest_B = jnp.max(cells.largest, axis=-1)
    peak_B = finite(largest_B)
    share = jnp.exp((cells.largest - peak_B[:, None]) * scale_B[:, None])
    mass_BC = cells.sum * share
    return Mass(largest_B, peak_B, spec.cell_total(mass_BC)), mass_BC


def draw_cell(mass_BC: jax.Array, keys_B2: jax.Array) -> jax.Array:
    """A cell for each row, int32 [B], with probability in proportion to its mass."""
    ids_1C = jnp.arange(mass_BC.shape[-1], dtype=jnp.int32)[None]
    noise_BC = noise.exponential(noise.bits(keys_B2, noise.CELLS, ids_1C))
    return first_largest(mass_BC / noise_BC, ids_1C)[1]


def first_largest(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the largest number of each row, the lowest id that has it), [B] each.

    Two plain reductions: they vectorise where argmax does not, and every backend has them.
    """
    # Both reductions read x. Without the barrier XLA may compute its noise once for each.
    x = jax.lax.optimization_barrier(x)
    best_B = _reduced(jnp.max, jnp.maximum, x)
    return best_B, first_largest_at(x, best_B, ids)


def first_largest_at(x: jax.Array, best_B: jax.Array, ids: jax.Array) -> jax.Array:
    """The lowest id at which a row has its largest number; NO_TOKEN where it has none."""
    at_best = x == expand(best_B, x)
    return _reduced(jnp.min, jnp.minimum, jnp.where(at_best, ids, spec.NO_TOKEN))


def greatest(keys: jax.Array) -> jax.Array:
    """The greatest of each row of int32 [B, ..., 16 n, 128]."""
    # As `spec.lane_sum` goes, for the speed of it; only the last few are left to a reduction.
    for _ in range(2):
        keys = functools.reduce(jnp.maximum, [keys[..., i::4, :] for i in range(4)])
    while keys.shape[-1] > 1:
        half = keys.shape[-1] // 2
        keys = jnp.maximum(keys[..., :half], keys[..., half:])
    return jnp.max(keys.reshape(keys.shape[0], -1), axis=1)


def finite(x: jax.Array) -> jax.Array:
    """0 for infinities, which keeps inf - inf = NaN out of the arithmetic."""
    return jnp.where(jnp.isinf(x), 0.0, x)


def _reduced(reduce, combine, x: jax.Array) -> jax.Array:
    """The largest or smallest of each row of [B, ...]: all axes but the lanes, then the lanes by
    halves, for the reason of `lane_sum`.
    """
    if x.ndim == 2 and x.shape[1] > LANES and x.shape[1] % LANES == 0:
        x = x.reshape(x.shape[0], -1, LANES)
    if x.ndim > 2:
        x = reduce(x, axis=tuple(range(1, x.ndim - 1)))
    if x.shape[1] > LANES:
        return reduce(x, axis=1)
    while x.shape[1] > 1:
        # Halves of an odd number share the middle, which does not matter here.
        half = (x.shape[1] + 1) // 2
        x = combine(x[:, :half], x[:, -half:])
    return x[:, 0]
