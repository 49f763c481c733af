"""Stage B: thresholds and the draw of filtered rows, from any list that holds the kept tokens.

The list is the candidates, or all of a small row, or, in the fallback, all of a row. Thresholds are
found by `search` over the integers that floats order as: no sort, and the result is a logit of the
row to the bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling import noise, search
from jaxconv_kernels.sampling.cells import Mass, first_largest
from jaxconv_kernels.sampling.spec import RowParameters, expand, from_ordered, ordered

_NO_KEY = -0x80000000  # below the key of every logit

Reduce = Callable[[jax.Array], jax.Array]


class Kept(NamedTuple):
    """What the filters keep of each row, [B] each.

    Attributes:
        threshold: float32, tau.
        top_k_threshold: float32, tau_k; -inf with top-k off.
        mass: float32, of the kept tokens, relative to the row's peak.
    """

    threshold: jax.Array
    top_k_threshold: jax.Array
    mass: jax.Array


def keep(
    x: jax.Array,
    row: Mass,
    parameters: RowParameters,
    *,
    add: Reduce,
    greatest: Reduce | None = None,
) -> tuple[Kept, jax.Array]:
    """Applies top-k, top-p and min-p.

    Args:
        x: float32 [B, ...] logits of a list that holds the kept tokens; -inf elsewhere.
        row: mass of the whole rows.
        parameters: of the rows.
        add: sums a float32 or int32 array like x over all but rows, to [B].
        greatest: the greatest of an int32 array like x, for a list that is dear to go through; None
            takes more passes, of less each.

    Returns:
        (what is kept, z [B, ...] with -inf where a token is not kept).
    """
    z = (x - expand(row.peak, x)) * expand(parameters.scale, x)
    key = ordered(x)
    mass = jnp.exp(z)
    lowest_B = jnp.full_like(parameters.top_k, search.LOWEST)
    highest_B = ordered(row.largest)
    # The logit of a token of the mean mass.
    tokens = float(x[0].size)
    guess_B = row.peak + jnp.log(row.total / tokens) / parameters.scale

    def threshold(weight, low_B, high_B, wanted_B, total_B):
        def look(at_B, wanted_B):
            above = key > expand(at_B, key)
            weight_B = add(jnp.where(above, weight, 0))
            if greatest is None:
                return weight_B, at_B
            # ~ turns the order round: the least key above is the greatest ~key from ~at - 1 down.
            turn_B = jnp.where(weight_B < wanted_B, 0, -1)
            turned, limit_B = key ^ expand(turn_B, key), jnp.where(turn_B < 0, -2 - at_B, at_B)
            within = jnp.where(turned <= expand(limit_B, key), turned, _NO_KEY)
            return weight_B, greatest(within) ^ turn_B

        if greatest is None:
            return search.halve(look, low_B, high_B, wanted_B)
        found_B, _ = search.interpolate(look, low_B, high_B, wanted_B, total=total_B, guess=guess_B)
        return found_B

    def kth_largest():
        on = parameters.top_k > 0
        total_B = jnp.full_like(row.total, tokens)
        high_B = jnp.where(on, highest_B, search.LOWEST)
        kth_B = threshold(1, lowest_B, high_B, parameters.top_k, total_B)
        top_mass = jnp.where(key >= expand(kth_B, key), mass, 0.0)
        return kth_B, top_mass, jnp.where(on, add(top_mass), row.total)

    def nucleus(kth_B, mass, total_B):
        high_B = jnp.where(parameters.top_p < 1, highest_B, kth_B)
        return threshold(mass, kth_B, high_B, parameters.top_p * total_B, total_B)

    any_top_k, any_top_p = jnp.any(parameters.top_k > 0), jnp.any(parameters.top_p < 1)
    kth_B, mass, total_B = jax.lax.cond(any_top_k, kth_largest, lambda: (lowest_B, mass, row.total))
    tau_B = jax.lax.cond(any_top_p, nucleus, lambda kth_B, *_: kth_B, kth_B, mass, total_B)
    margin_B = row.peak + parameters.min_p_margin
    threshold_B = jnp.maximum(from_ordered(tau_B), margin_B)
    kept = x >= expand(threshold_B, x)
    kept_mass_B = add(jnp.where(kept, mass, 0.0))
    return Kept(threshold_B, from_ordered(kth_B), kept_mass_B), jnp.where(kept, z, -jnp.inf)


def certified(kept: Kept, worst_B: jax.Array, parameters: RowParameters) -> jax.Array:
    """bool [B]: whether candidates down to `worst` were enough for `keep` to be exact."""
    needs_top_k = (parameters.top_k > 0) & (parameters.top_p < 1)
    decisive_B = jnp.where(needs_top_k, kept.top_k_threshold, kept.threshold)
    return (worst_B < decisive_B) | jnp.isneginf(worst_B)


def draw_kept(z: jax.Array, ids: jax.Array, keys_B2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(perturbed z, token) of the draw among the kept tokens of each row, [B] each."""
    gumbel = noise.gumbel(noise.bits(keys_B2, noise.TOKENS, ids))
    return first_largest(z + gumbel, ids)
