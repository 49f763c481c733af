"""The end of the TPU kernel: cells and tokens drawn, thresholds found, for 8 or 16 rows at a time.

`finish` and `cells` say the same in arrays of any shape; here a number of a row is spread over the
lanes, and a list of logits comes in slabs that are read again for every pass.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxconv_kernels.sampling import noise, search
from jaxconv_kernels.sampling.cells import finite
from jaxconv_kernels.sampling.finish import Kept, certified
from jaxconv_kernels.sampling.spec import (
    BINS,
    CELL,
    LANES,
    LEVELS,
    from_ordered,
    ordered,
    sum_of_rows,
)
from jaxconv_kernels.sampling.tpu_vectors import (
    any_row,
    fold,
    lane_ids,
    lane_sum,
    put,
    row_first,
    row_max,
    vectors,
    widen,
)

TOGETHER = 4  # cells of a step, which then wait together for what goes across lanes


class Number(enum.IntEnum):
    """Lanes of what the kernel is told of a row, int32 [B, 128]; floats as their bits."""

    KEY0 = 0
    KEY1 = 1
    SCALE = 2
    TOP_P = 3
    MIN_P_MARGIN = 4
    TOP_K = 5
    GREEDY = 6
    FILTERED = 7


class Found(enum.IntEnum):
    """Lanes of what the kernel finds, float32 [B, 128]."""

    TOKEN = 0
    LOGIT = 1
    LARGEST = 2
    TOTAL = 3
    RAW_LARGEST = 4
    RAW_TOTAL = 5
    THRESHOLD = 6
    TOP_K_THRESHOLD = 7
    KEPT = 8
    FALLBACK = 9


class Row(NamedTuple):
    """Parameters and mass of the rows, spread, [R, 128] each; see `RowParameters` and `Mass`."""

    key0: jax.Array
    key1: jax.Array
    scale: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p_margin: jax.Array
    largest: jax.Array
    peak: jax.Array
    total: jax.Array


class Listed(NamedTuple):
    """Logits that hold the kept tokens.

    Attributes:
        read: gives (logits float32, ids int32) [R, 128 n] of a slab.
        slabs: how many there are.
        look: of a function that makes float32 weights of a slab's logits, and a bound float32
            [R, 128]: (sum of the weights of logits above the bound, in the order of the
            specification; the greatest logit that is not above; the least that is), spread.
    """

    read: Callable[[jax.Array | int], tuple[jax.Array, jax.Array]]
    slabs: int
    look: Callable[
        [Callable[[jax.Array], jax.Array], jax.Array], tuple[jax.Array, jax.Array, jax.Array]
    ]


def finish(found, number, *, vocab, any_filtered, x, pairs, raw_pairs, top) -> None:
    """Draws the tokens of a block of rows.

    Args:
        found: reference float32 [R, 128], written in the lanes of `Found`.
        number: gives a `Number` of the rows, spread, with a dtype.
        vocab: tokens of a row.
        any_filtered: scalar, whether some row may be filtered.
        x: reference [R, N] to the clean, allowed logits; -inf behind the end of the rows.
        pairs: (largest, sum) [R, 128] of the cells at the temperature of the row.
        raw_pairs: the same, of all logits at temperature 1.
        top: references [LEVELS, R, BINS] to the candidates' logits and the slabs they come from.
    """
    scale = number(Number.SCALE, jnp.float32)
    largest, peak, total, mass_RC = _merged(*pairs, scale)
    raw_largest, _, raw_total, _ = _merged(*raw_pairs, jnp.ones_like(scale))
    certain = (number(Number.GREEDY) != 0) | (jnp.abs(largest) == jnp.inf)
    filtered = (number(Number.FILTERED) != 0) & ~certain
    row = Row(
        key0=number(Number.KEY0, jnp.uint32),
        key1=number(Number.KEY1, jnp.uint32),
        scale=scale,
        top_k=number(Number.TOP_K),
        top_p=number(Number.TOP_P, jnp.float32),
        min_p_margin=number(Number.MIN_P_MARGIN, jnp.float32),
        largest=largest,
        peak=peak,
        total=total,
    )

    def write(values, where):
        for lane, value in values.items():
            put(found, lane, jnp.where(where, value, found[:, lane : lane + 1]))

    cells = pl.cdiv(vocab, CELL)
    token, logit = _draw_from_cell(row, certain, pairs[0], mass_RC, _cell_reader(x, cells))
    unfiltered = {
        Found.TOKEN: token.astype(jnp.float32),
        Found.LOGIT: logit,
        Found.LARGEST: largest,
        Found.TOTAL: total,
        Found.RAW_LARGEST: raw_largest,
        Found.RAW_TOTAL: raw_total,
        Found.THRESHOLD: jnp.full_like(total, -jnp.inf),
        Found.TOP_K_THRESHOLD: jnp.full_like(total, -jnp.inf),
        Found.KEPT: total,
        Found.FALLBACK: jnp.zeros_like(total),
    }
    write(unfiltered, True)

    def draw(on, listed):
        wanted = row._replace(
            top_k=jnp.where(on, row.top_k, 0),
            top_p=jnp.where(on, row.top_p, 1.0),
            min_p_margin=jnp.where(on, row.min_p_margin, -jnp.inf),
        )
        token, logit, kept = _draw_filtered(wanted, listed, vocab)
        of_filtered = {
            Found.TOKEN: token.astype(jnp.float32),
            Found.LOGIT: logit,
            Found.THRESHOLD: kept.threshold,
            Found.TOP_K_THRESHOLD: kept.top_k_threshold,
            Found.KEPT: kept.mass,
        }
        write(of_filtered, on)
        return kept

    @pl.when(any_filtered)
    def _():
        kept = draw(filtered, _candidates(*top))
        todo = filtered & ~certified(kept, row_max(top[0][LEVELS - 1]), row)
        put(found, Found.FALLBACK, jnp.where(todo, 1.0, 0.0))

        @pl.when(any_row(todo))
        def _():
            draw(todo, _all_of(x, cells))


def _merged(largest_RC: jax.Array, sum_RC: jax.Array, scale: jax.Array):
    """(m, peak, Z, spread; mass [R, 128] of each cell) from the pairs of the cells."""
    largest = row_max(largest_RC)
    peak = finite(largest)
    mass_RC = sum_RC * jnp.exp((largest_RC - peak) * scale)
    return largest, peak, lane_sum(mass_RC), mass_RC


def _draw_from_cell(
    row: Row, certain: jax.Array, largest_RC: jax.Array, mass_RC: jax.Array, read_cell
) -> tuple[jax.Array, jax.Array]:
    """(token, its logit), spread, of unfiltered rows and of rows that are certain of theirs.

    Args:
        row: of the rows.
        certain: bool, spread: the row takes the first of its largest logits.
        largest_RC: largest logit of each cell.
        mass_RC: mass of each cell.
        read_cell: gives the logits [R, CELL] of a cell of each row, int32, spread.
    """
    lane = lane_ids(*mass_RC.shape)
    cell_noise = noise.exponential(noise.threefry(row.key0, row.key1, noise.CELLS, lane))
    score_RC = jnp.where(certain, largest_RC, mass_RC / cell_noise)
    cell = row_first(score_RC == row_max(score_RC), lane)
    base = finite(row_max(jnp.where(lane == cell, largest_RC, -jnp.inf)))

    x = read_cell(cell)
    at = lane_ids(*x.shape)
    key0, key1, scale = (widen(v, x) for v in (row.key0, row.key1, row.scale))
    bits = noise.threefry(key0, key1, noise.TOKENS_IN_CELL, widen(cell * CELL, x) + at)
    mass = jnp.exp((x - widen(base, x)) * scale)
    score = jnp.where(widen(certain, x), x, mass / noise.exponential(bits))
    first = row_first(score == widen(row_max(score), x), at)
    return cell * CELL + first, row_max(jnp.where(at == widen(first, x), x, -jnp.inf))


def _draw_filtered(row: Row, listed: Listed, vocab: int) -> tuple[jax.Array, jax.Array, Kept]:
    """(token, its logit, what the filters keep), spread; a filter that is off is 0, 1 or -inf."""

    def z(x):
        return (x - widen(row.peak, x)) * widen(row.scale, x)

    def mass_from(bound):
        def weigh(x):
            return jnp.where(x >= widen(bound, x), jnp.exp(z(x)), 0.0)

        return listed.look(weigh, jnp.full_like(bound, -jnp.inf))[0]

    def threshold_of(weigh, low, high, wanted, total):
        def look(at, wanted):
            weight, below, above = listed.look(weigh, from_ordered(at))
            return weight, ordered(jnp.where(weight < wanted, below, above))

        guess = row.peak + jnp.log(row.total / vocab) / row.scale
        return search.interpolate(
            look, low, high, wanted, total=total, guess=guess, any_row=any_row
        )[0]

    highest, lowest = ordered(row.largest), jnp.full_like(row.top_k, search.LOWEST)
    by_count, by_mass = row.top_k > 0, row.top_p < 1
    kth = threshold_of(
        jnp.ones_like,
        lowest,
        jnp.where(by_count, highest, lowest),
        row.top_k.astype(jnp.float32),
        jnp.full_like(row.total, vocab),
    )
    top_k_threshold = from_ordered(kth)
    total = jnp.where(by_count, mass_from(top_k_threshold), row.total)
    tau = threshold_of(
        lambda x: jnp.exp(z(x)), kth, jnp.where(by_mass, highest, kth), row.top_p * total, total
    )
    threshold = jnp.maximum(from_ordered(tau), row.peak + row.min_p_margin)
    mass = mass_from(threshold)

    def contest(i, best):
        x, ids = listed.read(i)
        bits = noise.threefry(widen(row.key0, x), widen(row.key1, x), noise.TOKENS, ids)
        score = jnp.where(x >= widen(threshold, x), z(x) + noise.gumbel(bits), -jnp.inf)
        better = (score > best[0]) | ((score == best[0]) & (ids < best[1]))
        return tuple(
            jnp.where(better, new, old) for new, old in zip((score, ids, x), best, strict=True)
        )

    x, ids = listed.read(0)
    nothing = jnp.full_like(x, -jnp.inf)
    score, ids, x = lax.fori_loop(0, listed.slabs, contest, (nothing, ids, nothing))
    token = row_first(score == widen(row_max(score), x), ids)
    logit = row_max(jnp.where(ids == widen(token, x), x, -jnp.inf))
    return token, logit, Kept(threshold, top_k_threshold, mass)


def _cell_reader(x_ref, cells: int):
    """A function of a cell of each row, int32, spread, that gives its logits, [R, CELL]."""

    def read_cell(cell):
        def one(row, x):
            here = lax.broadcasted_iota(jnp.int32, cell.shape, 0) == row
            at = jnp.max(jnp.where(here, cell.astype(jnp.float32), 0.0)).astype(jnp.int32)
            read = _cell(x_ref, jnp.minimum(at, cells - 1))
            return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) == row, read, x)

        height = len(cell)
        return lax.fori_loop(0, height, one, jnp.zeros((height, CELL), jnp.float32))

    return read_cell


def _cell(x_ref, cell):
    return x_ref[:, pl.ds(pl.multiple_of(cell * CELL, CELL), CELL)].astype(jnp.float32)


def _candidates(top_x, top_slab) -> Listed:
    def read(level):
        slab = top_slab[level]
        return top_x[level], slab * BINS + lane_ids(*slab.shape)

    def look(weigh, bound):
        weights, below, above = [], jnp.full_like(bound, -jnp.inf), jnp.full_like(bound, jnp.inf)
        for level in range(LEVELS):
            seen, below, above = _seen(top_x[level], weigh, bound, below, above)
            weights += seen
        return lane_sum(sum_of_rows(weights)), row_max(below), -row_max(-above)

    return Listed(read, LEVELS, look)


def _all_of(x_ref, cells: int) -> Listed:
    height = len(x_ref)

    def read(cell):
        return _cell(x_ref, cell), cell * CELL + lane_ids(height, CELL)

    def look(weigh, bound):
        def group(g, carry):
            sums, below, above = carry
            for i in range(TOGETHER):
                cell = g * TOGETHER + i
                weights, below, above = _seen(_cell(x_ref, cell), weigh, bound, below, above)
                total = lane_sum(sum_of_rows(weights))
                sums = jnp.where(lane_ids(height) == cell, total, sums)
            return sums, below, above

        nothing = jnp.zeros((height, LANES), jnp.float32)
        start = nothing, nothing - jnp.inf, nothing + jnp.inf
        sums, below, above = lax.fori_loop(0, pl.cdiv(cells, TOGETHER), group, start)
        return lane_sum(sums), row_max(below), -row_max(-above)

    return Listed(read, cells, look)


def _seen(x, weigh, bound, below, above):
    """(vectors of the weights of logits above the bound, 0 for others; the greatest logit not above
    by lane, and the least above, of these and of those before).
    """
    over = x > widen(bound, x)
    below = fold(jnp.maximum, jnp.where(over, -jnp.inf, x), below)
    above = fold(jnp.minimum, jnp.where(over, x, jnp.inf), above)
    return vectors(jnp.where(over, weigh(x), 0.0)), below, above
