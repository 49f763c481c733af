"""Stage B in Mosaic GPU: the draw of a row from its cells and candidates, one program a row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxconv_kernels.sampling import noise, search
from jaxconv_kernels.sampling.gpu_read import (
    PARAMETERS,
    ROWS,
    SLAB,
    Reading,
    clean,
    finite,
    full,
    insert,
    iota,
    layout,
)
from jaxconv_kernels.sampling.spec import (
    LANES,
    LEVELS,
    NO_TOKEN,
    RowParameters,
    from_ordered,
    ordered,
)

_BINS = (SLAB, LANES)


class Drawn(NamedTuple):
    """What a program says of its row, [B] each.

    Attributes:
        token: int32, NO_TOKEN in a row of no allowed token.
        largest: float32, the largest allowed logit.
        total: float32, Z.
        raw_largest: float32, the largest of the logits as given.
        raw_total: float32, their mass at temperature 1.
        threshold: float32, tau; that and what follows is defined in filtered rows alone.
        kept_mass: float32, mass of the kept tokens.
        certified: int32, 1 where the candidates were enough.
    """

    token: jax.Array
    largest: jax.Array
    total: jax.Array
    raw_largest: jax.Array
    raw_total: jax.Array
    threshold: jax.Array
    kept_mass: jax.Array
    certified: jax.Array


def draw(
    reading: Reading,
    logits_BRL: jax.Array,
    allowed_BCL: jax.Array | None,
    keys_B2: jax.Array,
    parameters: RowParameters,
    *,
    interpret=None,
) -> Drawn:
    """Draws every row; of the logits it reads one cell a row.

    Sums over candidates, which decide top-p and give the kept mass, are in the order of Mosaic's
    reductions; all other sums are in that of `spec`. Barriers keep the rounding of products, which
    a fused multiply-add would skip.

    Args:
        reading: what `gpu_read.read` left.
        logits_BRL, allowed_BCL: as it took them.
        keys_B2: uint32, threefry key data.
        parameters: of the rows.
        interpret: Pallas's parameters for running it as plain operations on a CPU.
    """
    b, vectors, _ = logits_BRL.shape
    parts = reading.logit.shape[1]
    cell_vectors = reading.largest.shape[2] // LANES
    masked = allowed_BCL is not None

    def kernel(*refs):
        largest_B2N, sum_B2N, logit_BPTSL, token_BPTSL, logits_BRL, *refs = refs
        allowed_BCL = refs.pop(0) if masked else None
        keys_B2, scale_B, greedy_B, filtered_B, top_k_B, top_p_B, margin_B, *refs = refs
        *out, halves_smem = refs
        out = Drawn(*out)
        row = lax.axis_index("row")
        key = keys_B2[row, 0], keys_B2[row, 1]
        scale = scale_B[row]

        def mass_of_cells(statistic, scale):
            """(largest of the row, its mass, [(`largest`, mass) of 128 cells, …])."""
            at = [(row, statistic, pl.ds(i * LANES, LANES)) for i in range(cell_vectors)]
            tops = [largest_B2N[at_L] for at_L in at]
            top = jnp.max(functools.reduce(jnp.maximum, tops))
            peak = finite(top)
            masses = [
                lax.optimization_barrier(sum_B2N[at_L] * jnp.exp((top_L - peak) * scale))
                for at_L, top_L in zip(at, tops, strict=True)
            ]
            total = lane_total(functools.reduce(jnp.add, masses), halves_smem)
            return top, total, list(zip(tops, masses, strict=True))

        top, total, cells = mass_of_cells(1, scale)
        raw_top, raw_total, _ = mass_of_cells(0, 1.0)
        peak = finite(top)
        certain = (greedy_B[row] != 0) | (top == jnp.inf) | (top == -jnp.inf)

        def draw_from_a_cell():
            """The first of the largest in a row that is certain, else the two-level draw."""
            best_L, cell_L = full(-jnp.inf), full(NO_TOKEN)
            for i, (top_L, mass_L) in enumerate(cells):
                id_L = iota() + i * LANES
                noise_L = noise.exponential(noise.threefry(*key, noise.CELLS, id_L))
                score_L = jnp.where(certain, top_L, mass_L / noise_L)
                cell_L = jnp.where(score_L > best_L, id_L, cell_L)
                best_L = jnp.maximum(score_L, best_L)
            # In a row of no allowed token no cell is best: then the last one is read in vain.
            cell = jnp.minimum(first_largest([(best_L, cell_L)]), (vectors - 1) // ROWS)
            of_cell = [
                jnp.where(iota() + i * LANES == cell, top_L, -jnp.inf)
                for i, (top_L, _) in enumerate(cells)
            ]
            base = finite(jnp.max(functools.reduce(jnp.maximum, of_cell)))

            # The last cell may be short: then its reading starts in the cell before.
            block = (ROWS, LANES)
            start = jnp.minimum(cell * ROWS, vectors - ROWS)
            row_RL = iota(block, 0) + start
            token_RL = row_RL * LANES + iota(block, 1)
            x_RL = logits_BRL[row, pl.ds(start, ROWS)]
            x_RL = clean(plgpu.layout_cast(x_RL, layout(block)), row_RL >= cell * ROWS)
            if masked:
                word_RL = lax.broadcast_in_dim(allowed_BCL[row, cell], block, [1])
                # Where the reading starts early the shift is negative, and x is -inf already.
                bit_RL = (word_RL >> ((row_RL - cell * ROWS) & (ROWS - 1))) & 1
                x_RL = jnp.where(bit_RL == 1, x_RL, -jnp.inf)
            noise_RL = noise.exponential(noise.threefry(*key, noise.TOKENS_IN_CELL, token_RL))
            mass_RL = jnp.exp((x_RL - base) * scale)
            score_RL = jnp.where(certain, x_RL, mass_RL / noise_RL)
            out.token[row] = first_largest([(score_RL, token_RL)])

        def draw_from_candidates():
            candidates = [
                tuple(
                    plgpu.layout_cast(ref[row, 0, level], layout(_BINS))
                    for ref in (logit_BPTSL, token_BPTSL)
                )
                for level in range(LEVELS)
            ]

            def merge(i, levels):
                at = (row, i // LEVELS, lax.rem(i, LEVELS))
                x_SL = plgpu.layout_cast(logit_BPTSL[at], layout(_BINS))
                token_SL = plgpu.layout_cast(token_BPTSL[at], layout(_BINS))
                return insert(levels, x_SL, token_SL)

            if parts > 1:
                candidates = lax.fori_loop(LEVELS, parts * LEVELS, merge, candidates)
            worst = jnp.max(candidates[-1][0])
            z = [lax.optimization_barrier((x_SL - peak) * scale) for x_SL, _ in candidates]
            mass = [jnp.exp(z_SL) for z_SL in z]
            order = [ordered(x_SL) for x_SL, _ in candidates]
            top_k, top_p = top_k_B[row], top_p_B[row]
            highest = ordered(top)

            def least_key(weights, low, high, wanted):
                def look(at, wanted):
                    above = [
                        jnp.where(order_SL > at, weight_SL, 0.0)
                        for order_SL, weight_SL in zip(order, weights, strict=True)
                    ]
                    return _add(above), at

                return search.halve(look, low, high, wanted, any_row=lambda x: x)

            lowest = highest * 0 + search.LOWEST
            ones = [full(1.0, _BINS)] * LEVELS
            high = jnp.where(top_k > 0, highest, lowest)
            kth = least_key(ones, lowest, high, top_k.astype(jnp.float32))
            top_mass = [
                jnp.where(order_SL >= kth, mass_SL, 0.0)
                for order_SL, mass_SL in zip(order, mass, strict=True)
            ]
            wanted = top_p * jnp.where(top_k > 0, _add(top_mass), total)
            tau = least_key(top_mass, kth, jnp.where(top_p < 1, highest, kth), wanted)
            threshold = jnp.maximum(from_ordered(tau), peak + margin_B[row])
            kept = [x_SL >= threshold for x_SL, _ in candidates]
            out.threshold[row] = threshold
            out.kept_mass[row] = _add(
                [jnp.where(kept_SL, m_SL, 0.0) for kept_SL, m_SL in zip(kept, mass, strict=True)]
            )
            needs_top_k = (top_k > 0) & (top_p < 1)
            decisive = jnp.where(needs_top_k, from_ordered(kth), threshold)
            enough = (worst < decisive) | (worst == -jnp.inf)
            out.certified[row] = jnp.where(enough, 1, 0)

            perturbed = []
            for (_, token_SL), z_SL, kept_SL in zip(candidates, z, kept, strict=True):
                gumbel_SL = noise.gumbel(noise.threefry(*key, noise.TOKENS, token_SL))
                perturbed.append((jnp.where(kept_SL, z_SL, -jnp.inf) + gumbel_SL, token_SL))
            out.token[row] = first_largest(perturbed)

        out.largest[row] = top
        out.total[row] = total
        out.raw_largest[row] = raw_top
        out.raw_total[row] = raw_total
        filtered = (filtered_B[row] != 0) & ~certain
        pl.when(filtered)(draw_from_candidates)
        pl.when(~filtered)(draw_from_a_cell)

    whole, real = (jax.ShapeDtypeStruct((b,), dtype) for dtype in (jnp.int32, jnp.float32))
    run = plgpu.kernel(
        kernel,
        out_type=Drawn(whole, real, real, real, real, real, real, whole),
        scratch_types=[plgpu.SMEM((2 * LANES,), jnp.float32)],
        grid=(b,),
        grid_names=("row",),
        compiler_params=PARAMETERS,
        interpret=interpret,
    )
    arrays = (
        *reading,
        logits_BRL,
        allowed_BCL,
        keys_B2,
        parameters.scale,
        parameters.greedy.astype(jnp.int32),
        parameters.filtered.astype(jnp.int32),
        parameters.top_k,
        parameters.top_p,
        parameters.min_p_margin,
    )
    return run(*[x for x in arrays if x is not None])


def lane_total(x_L: jax.Array, halves_smem) -> jax.Array:
    """`spec.lane_sum` of one vector: its sum by halves, which all lanes come to."""
    for width in (64, 32, 16, 8, 4, 2, 1):
        halves_smem[pl.ds(0, LANES)] = x_L
        halves_smem[pl.ds(LANES, LANES)] = x_L
        x_L = x_L + halves_smem[pl.ds(width, LANES)]
    return jnp.max(x_L)


def _add(arrays: list) -> jax.Array:
    return jnp.sum(functools.reduce(jnp.add, arrays))


def first_largest(scored: list) -> jax.Array:
    """The lowest id that has the largest score of [(scores, ids), …]."""
    best = jnp.max(functools.reduce(jnp.maximum, [score for score, _ in scored]))
    at_best = [jnp.where(score == best, ids, NO_TOKEN) for score, ids in scored]
    return jnp.min(functools.reduce(jnp.minimum, at_best))
