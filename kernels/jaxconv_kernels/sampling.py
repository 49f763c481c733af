"""One token a row from a batch of logits, with per-row temperature, top-k, top-p and min-p.

The order is: allowed-token mask, temperature, top-k, renormalise, top-p, min-p. Every filter keeps
the tokens whose logit is at least some threshold of the row, so ties at the threshold all stay and
the likeliest token always does. A row's token depends on its own logits, parameters and key only,
never on the rest of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LANE = 32  # tokens a cell of the unfiltered draw
_LARGEST = jnp.finfo(jnp.float32).max


class Sampled(NamedTuple):
    """One draw a row.

    Attributes:
        token: int32 [B]; 0 where no token is allowed.
        logprob_raw: float32 [B], of the token under softmax(logits): no mask, temperature or
            filter.
        logprob_processed: float32 [B], of the token under the distribution it was drawn from
            (mask, temperature and filters applied); 0 for a greedy row.
        empty: bool [B], true where every logit was -inf, NaN or masked; both log-probs are -inf.
    """

    token: jax.Array
    logprob_raw: jax.Array
    logprob_processed: jax.Array
    empty: jax.Array


def sample(
    logits: jax.Array,
    keys: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
    min_p: jax.Array | float = 0.0,
    mask: jax.Array | None = None,
) -> Sampled:
    """Draws one token for each row.

    Filtered rows (any of top-k, top-p, min-p on) are drawn by the Gumbel-max rule with the row's
    key: exactly `jax.random.categorical(key, z)` with z = (logit - max) / temperature on kept
    tokens and -inf elsewhere. Unfiltered rows are drawn by inverting the distribution function,
    which needs two random words a row rather than one for each token.

    Args:
        logits: float [B, V]. NaN counts as -inf, +inf as the largest finite float.
        keys: typed PRNG keys [B]. Never reuse a key.
        temperature: float, or [B]; 0 is greedy, and the lowest index wins a tie.
        top_k: int, or [B]; at most 0, or at least V, is off.
        top_p: float, or [B]; at least 1 is off.
        min_p: float, or [B]; least probability as a share of the likeliest; at most 0 is off.
        mask: bool [B, V], true where a token is allowed; None allows all.
    """
    rows, vocab = logits.shape
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))
    top_k = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), (rows,))
    top_p = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), (rows,))
    min_p = jnp.broadcast_to(jnp.asarray(min_p, jnp.float32), (rows,))

    raw_BV = logits.astype(jnp.float32)
    raw_BV = jnp.where(jnp.isnan(raw_BV), -jnp.inf, jnp.minimum(raw_BV, _LARGEST))
    x_BV = raw_BV if mask is None else jnp.where(mask, raw_BV, -jnp.inf)
    top_B = jnp.max(x_BV, axis=-1)
    empty_B = jnp.isneginf(top_B)
    # A stand-in maximum for empty rows keeps -inf - -inf = NaN out of the arithmetic.
    max_B = jnp.where(empty_B, 0.0, top_B)

    greedy_B = temperature <= 0
    # The floor keeps 1 / temperature finite, so that the likeliest token's 0 / temperature is 0.
    scale_B = 1.0 / jnp.where(greedy_B, 1.0, jnp.maximum(temperature, 1e-12))
    z_BV = (x_BV - max_B[:, None]) * scale_B[:, None]

    filtered_B = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    filtered_B &= ~greedy_B

    def draw_unfiltered():
        return _invert(z_BV, keys)

    def draw_with_filters():
        threshold_B = _threshold(z_BV, top_k, top_p, min_p)
        kept_BV = jnp.where(z_BV >= threshold_B[:, None], z_BV, -jnp.inf)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(keys)
        chosen_B = _first_argmax(kept_BV + noise_BV)
        log_mass_B = jax.nn.logsumexp(kept_BV, axis=-1)
        plain_B, plain_log_mass_B = draw_unfiltered()
        return (
            jnp.where(filtered_B, chosen_B, plain_B),
            jnp.where(filtered_B, log_mass_B, plain_log_mass_B),
        )

    token_B, log_mass_B = jax.lax.cond(jnp.any(filtered_B), draw_with_filters, draw_unfiltered)
    token_B = jax.lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.where(greedy_B, _first_argmax(x_BV), token_B),
        lambda: token_B,
    )
    token_B = jnp.where(empty_B, 0, token_B)
    processed_B = jnp.where(greedy_B, 0.0, _pick(z_BV, token_B) - log_mass_B)
    raw_B = _pick(raw_BV, token_B) - jax.nn.logsumexp(raw_BV, axis=-1)
    return Sampled(
        token=token_B,
        logprob_raw=jnp.where(empty_B, -jnp.inf, raw_B),
        logprob_processed=jnp.where(empty_B, -jnp.inf, processed_B),
        empty=empty_B,
    )


def _threshold(z_BV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Least kept z of each row; z is at most 0.

    No sort: both thresholds are found by bisection over the 32-bit patterns of the floats, which
    takes one counting pass a bit.
    """
    key_BV = _ordered(z_BV)
    mass_BV = jnp.exp(z_BV)
    k_B = jnp.where(top_k > 0, top_k, z_BV.shape[-1])

    # The largest value that at least k tokens reach. Counts fall as the value rises.
    def too_few(value_B):
        return jnp.sum(key_BV >= value_B[:, None], axis=-1) < k_B

    lowest_B, highest_B = _ordered(jnp.full_like(top_p, -jnp.inf)), jnp.max(key_BV, axis=-1)
    kth_B = _bisect(too_few, lowest_B, highest_B + 1) - 1
    mass_BV = jnp.where(key_BV >= kth_B[:, None], mass_BV, 0.0)
    wanted_B = top_p * jnp.sum(mass_BV, axis=-1)

    # The least value above which lies less than top_p of the mass: its own tokens stay.
    def little_above(value_B):
        return jnp.sum(jnp.where(key_BV > value_B[:, None], mass_BV, 0.0), axis=-1) < wanted_B

    pth_B = jnp.where(top_p < 1, _bisect(little_above, lowest_B, highest_B), lowest_B)
    mth_B = jnp.where(min_p > 0, jnp.minimum(jnp.log(min_p), 0.0), -jnp.inf)
    return jnp.maximum(_ordered_inverse(jnp.maximum(kth_B, pth_B)), mth_B)


def _bisect(holds, low_B: jax.Array, high_B: jax.Array) -> jax.Array:
    """Least int32 in [low, high] at which a monotone predicate holds; `high` where none below."""

    def halve(_, bounds):
        low_B, high_B = bounds
        # The floor of the mean, without overflow.
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        yes_B = holds(middle_B)
        return jnp.where(yes_B, low_B, jnp.minimum(middle_B + 1, high_B)), jnp.where(
            yes_B, middle_B, high_B
        )

    return jax.lax.fori_loop(0, 32, halve, (low_B, high_B))[1]


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _ordered_inverse(key: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _invert(z_BV: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(token [B], log of the row's mass [B]) of draws from softmax(z), z at most 0.

    First a cell of `_LANE` tokens by the cells' masses, then a token inside it, each by its own
    uniform number, so that the resolution is that of float32 at both levels.
    """
    rows, vocab = z_BV.shape
    padded_BV = jnp.pad(z_BV, ((0, 0), (0, -vocab % _LANE)), constant_values=-jnp.inf)
    mass_BCL = jnp.exp(padded_BV).reshape(rows, -1, _LANE)
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    cells_BC = jnp.cumsum(jnp.sum(mass_BCL, axis=-1), axis=-1)
    cell_B = _crossing(cells_BC, u_B2[:, 0])
    inside_BL = jnp.take_along_axis(mass_BCL, cell_B[:, None, None], axis=1)[:, 0]
    lane_B = _crossing(jnp.cumsum(inside_BL, axis=-1), u_B2[:, 1])
    return cell_B * _LANE + lane_B, jnp.log(cells_BC[:, -1])


def _crossing(cumulative: jax.Array, u_B: jax.Array) -> jax.Array:
    """First index where the cumulative mass passes u of the total; its own mass is positive."""
    reached = cumulative <= u_B[:, None] * cumulative[:, -1:]
    # u < 1, so the last entry is passed except in a row of no mass at all.
    return jnp.minimum(jnp.sum(reached, axis=-1, dtype=jnp.int32), cumulative.shape[-1] - 1)


def _first_argmax(x_BV: jax.Array) -> jax.Array:
    """Lowest index of the maximum: two plain reductions, which vectorise where argmax does not."""
    index_V = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
    top_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_BV == top_B1, index_V, x_BV.shape[-1]), axis=-1)


def _pick(x_BV: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BV, index_B[:, None], axis=-1)[:, 0]
