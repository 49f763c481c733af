"""Stage C in Mosaic GPU: the exact passes of rows whose candidates were not enough.

One program a row; those of other rows leave at once. A pass brings the cells of the row as
`gpu_read` does, from memory again where all rows together outgrow the cache, and sums in the order
of the specification: thresholds and tokens are those of `fallback`, which does the same in XLA.
Noise is computed for the cells that hold a kept token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxconv_kernels.sampling import noise, search
from jaxconv_kernels.sampling.cells import Mass
from jaxconv_kernels.sampling.gpu_draw import first_largest, lane_total
from jaxconv_kernels.sampling.gpu_read import (
    PARAMETERS,
    ROWS,
    by_halves,
    clean,
    finite,
    full,
    iota,
)
from jaxconv_kernels.sampling.spec import (
    CELL,
    LANES,
    NO_TOKEN,
    RowParameters,
    from_ordered,
    ordered,
    sum_of_rows,
)

_STAGES = 4  # cells on their way or at work


class Exact(NamedTuple):
    """What a program says of its row, [B] each; undefined in rows that were not to do.

    Attributes:
        token: int32.
        threshold: float32, tau.
        kept_mass: float32, mass of the kept tokens.
    """

    token: jax.Array
    threshold: jax.Array
    kept_mass: jax.Array


def draw(
    todo_B: jax.Array,
    largest_BN: jax.Array,
    logits_BRL: jax.Array,
    allowed_BCL: jax.Array | None,
    keys_B2: jax.Array,
    row: Mass,
    parameters: RowParameters,
    *,
    interpret=None,
) -> Exact:
    """Draws the rows to do.

    Args:
        todo_B: bool.
        largest_BN: float32, the largest allowed logit of each cell, as in `gpu_read.Reading`.
        logits_BRL, allowed_BCL: as `gpu_read.read` took them.
        keys_B2: uint32, threefry key data.
        row: mass of the rows.
        parameters: of the rows.
        interpret: Pallas's parameters for running it as plain operations on a CPU.
    """
    b, vectors, _ = logits_BRL.shape
    cells = pl.cdiv(vectors, ROWS)
    blocks = pl.cdiv(cells, LANES)  # of cells whose sums are finished at once, one a thread
    masked = allowed_BCL is not None

    def kernel(*refs):
        todo_B, largest_BN, logits_BRL, *refs = refs
        allowed_BCL = refs.pop(0) if masked else None
        keys_B2, largest_B, total_B, scale_B, top_k_B, top_p_B, margin_B, *refs = refs
        *out, lanes_smem, sums_smem, halves_smem = refs
        out = Exact(*out)
        row = lax.axis_index("row")

        def go_through(body, carry):
            """(sum of the weights, carry) of body(cell, vectors, carry) -> (weights, carry)."""

            def at_step(indices, x_smem, *refs):
                *allowed_smem, carry = refs
                cell = indices[0]
                slot = lax.rem(cell, LANES)
                x = [clean(x_smem[r], cell * ROWS + r < vectors) for r in range(ROWS)]
                if masked:
                    word_L = allowed_smem[0][...]
                    x = [jnp.where((word_L >> r) & 1 == 1, x[r], -jnp.inf) for r in range(ROWS)]
                weights, carry = body(cell, x, carry)
                lanes_smem[slot, pl.ds(0, LANES)] = sum_of_rows(weights)

                def finish():
                    sums_L = jnp.where(iota() <= slot, by_halves(lanes_smem, 0, 1), 0.0)
                    sums_smem[pl.ds(pl.multiple_of(cell - slot, LANES), LANES)] = sums_L

                pl.when((slot == LANES - 1) | (cell == cells - 1))(finish)
                return carry

            specs = [
                plgpu.BlockSpec((None, ROWS, LANES), lambda cell: (row, cell, 0)),
                plgpu.BlockSpec((None, None, LANES), lambda cell: (row, cell, 0)),
            ]
            run = plgpu.emit_pipeline(
                at_step,
                grid=(cells,),
                in_specs=specs[: 1 + masked],
                max_concurrent_steps=_STAGES,
                init_carry=carry,
            )
            carry = run(*[logits_BRL, allowed_BCL][: 1 + masked])
            sums = [sums_smem[pl.ds(i * LANES, LANES)] for i in range(blocks)]
            return lane_total(sum_of_rows(sums), halves_smem), carry

        def draw():
            largest, scale = largest_B[row], scale_B[row]
            peak = finite(largest)

            def z(x_L):
                return lax.optimization_barrier((x_L - peak) * scale)

            def threshold(weigh, low, high, wanted, total):
                def look(at, wanted):
                    bound = from_ordered(at)

                    def body(cell, x, carry):
                        weights, (below_L, above_L) = [], carry
                        for x_L in x:
                            over = x_L > bound
                            weights.append(jnp.where(over, weigh(x_L), 0.0))
                            below_L = jnp.maximum(below_L, jnp.where(over, -jnp.inf, x_L))
                            above_L = jnp.minimum(above_L, jnp.where(over, x_L, jnp.inf))
                        return weights, (below_L, above_L)

                    start = full(-jnp.inf), full(jnp.inf)
                    weight, (below_L, above_L) = go_through(body, start)
                    nearest = jnp.where(weight < wanted, jnp.max(below_L), jnp.min(above_L))
                    return weight, ordered(nearest)

                guess = peak + jnp.log(total_B[row] / (vectors * LANES)) / scale
                return search.interpolate(
                    look, low, high, wanted, total=total, guess=guess, any_row=lambda x: x
                )[0]

            def mass_from(bound):
                def body(cell, x, carry):
                    return [jnp.where(x_L >= bound, jnp.exp(z(x_L)), 0.0) for x_L in x], carry

                return go_through(body, full(0.0))[0]

            top_k, top_p = top_k_B[row], top_p_B[row]
            highest = ordered(largest)
            lowest = highest * 0 + search.LOWEST
            kth = threshold(
                lambda x_L: full(1.0),
                lowest,
                jnp.where(top_k > 0, highest, lowest),
                top_k.astype(jnp.float32),
                peak * 0 + float(vectors * LANES),
            )
            total = lax.cond(top_k > 0, lambda: mass_from(from_ordered(kth)), lambda: total_B[row])
            tau = threshold(
                lambda x_L: jnp.exp(z(x_L)),
                kth,
                jnp.where(top_p < 1, highest, kth),
                top_p * total,
                total,
            )
            bound = jnp.maximum(from_ordered(tau), peak + margin_B[row])
            key = keys_B2[row, 0], keys_B2[row, 1]

            def body(cell, x, best):
                def contest(*best):
                    best_L, token_L = best
                    for r, x_L in enumerate(x):
                        id_L = iota() + (cell * CELL + r * LANES)
                        gumbel_L = noise.gumbel(noise.threefry(*key, noise.TOKENS, id_L))
                        score_L = jnp.where(x_L >= bound, z(x_L) + gumbel_L, -jnp.inf)
                        token_L = jnp.where(score_L > best_L, id_L, token_L)
                        best_L = jnp.maximum(score_L, best_L)
                    return best_L, token_L

                weights = [jnp.where(x_L >= bound, jnp.exp(z(x_L)), 0.0) for x_L in x]
                holds_kept = largest_BN[row, cell] >= bound
                return weights, lax.cond(holds_kept, contest, lambda *best: best, *best)

            kept_mass, best = go_through(body, (full(-jnp.inf), full(NO_TOKEN)))
            out.token[row] = first_largest([best])
            out.threshold[row] = bound
            out.kept_mass[row] = kept_mass

        pl.when(todo_B[row] != 0)(draw)

    whole, real = (jax.ShapeDtypeStruct((b,), dtype) for dtype in (jnp.int32, jnp.float32))
    run = plgpu.kernel(
        kernel,
        out_type=Exact(whole, real, real),
        # The odd row length keeps a column's elements in different banks.
        scratch_types=[
            plgpu.SMEM((LANES, LANES + 1), jnp.float32),
            plgpu.SMEM((blocks * LANES,), jnp.float32),
            plgpu.SMEM((2 * LANES,), jnp.float32),
        ],
        grid=(b,),
        grid_names=("row",),
        compiler_params=PARAMETERS,
        interpret=interpret,
    )
    arrays = (
        todo_B.astype(jnp.int32),
        largest_BN,
        logits_BRL,
        allowed_BCL,
        keys_B2,
        row.largest,
        row.total,
        parameters.scale,
        parameters.top_k,
        parameters.top_p,
        parameters.min_p_margin,
    )
    return run(*[x for x in arrays if x is not None])
