"""The search for a threshold: the least key above which too little weighs.

A list of tokens has keys, integers in the order of its logits (`spec.ordered`), and weights: 1 to
count tokens, exp(z) to sum their mass. Wanted is the least integer `at` in [low, high] with

    weight{key > at} < wanted,

which holds at high. A sum of floats in a fixed order grows with each of its terms, so what is below
that integer fails, what is above holds, and every way to search finds the same one. Each look at
the list is a pass over it; `interpolate` needs few of them, `halve` only simple ones.

Everything here is elementwise: a number of each row may be an array [B], spread over lanes, or, in
a kernel of one row, a scalar.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_kernels.sampling.spec import from_ordered, ordered

LOWEST = -0x7F800001  # ordered(-inf)

_INTERPOLATED = 12  # passes; later ones halve the keys that are left, at most 32 times
_LEAST_REST = 0.1
_TINY = 1e-30

# (at, wanted) -> (weight{key > at}, the greatest key <= at where that is less than wanted and the
# least key > at where it is not; any integer where no token has such a key)
Look = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class _Bracket(NamedTuple):
    """Where the threshold may be, and how heavy it is at both ends.

    Attributes:
        passes: int32 scalar, made so far.
        low, high: int32, the least and the greatest it may be.
        odds_low, odds_high: float32, log-odds of the weight there, relative to those wanted: at
            least 0 and at most 0, but for rounding.
        logit_before, odds_before: float32, of the `high` before this one.
        side: int32, 1 where the last pass moved `high`, -1 where it moved `low`, 0 before it.
    """

    passes: jax.Array
    low: jax.Array
    high: jax.Array
    odds_low: jax.Array
    odds_high: jax.Array
    logit_before: jax.Array
    odds_before: jax.Array
    side: jax.Array


def interpolate(
    look: Look,
    low: jax.Array,
    high: jax.Array,
    wanted: jax.Array,
    *,
    total: jax.Array,
    guess: jax.Array,
    any_row: Callable[[jax.Array], jax.Array] = jnp.any,
) -> tuple[jax.Array, jax.Array]:
    """Finds the threshold in 4 to 13 passes over logits that spread as those of models do, and in
    at most 44 over any.

    Seen from the logits, the log-odds of the weight above are close to a line for bell-shaped and
    for exponential rows, so the next pass looks where the line through both ends of the bracket
    says. Of an end that stays where it is twice, the odds are halved (the Illinois rule), which
    keeps the other from creeping. A pass also moves the end to the nearest logit there is, so that
    few tokens are soon none. Where no line can be drawn, or does not help, keys are halved.

    Args:
        look: a pass over the list.
        low, high: int32 keys.
        wanted: float32, or int32 to count.
        total: float32, about the weight of all tokens from `low` on.
        guess: float32, the logit where to look first.
        any_row: whether a condition holds in some row, a scalar.

    Returns:
        (the threshold, passes).
    """
    rest = jnp.maximum(total - wanted, 0.0) * _LEAST_REST

    def log_odds(weight):
        weight = weight.astype(jnp.float32)
        # `rest` is what an end where all or nothing weighs counts for, in place of infinity.
        return jnp.log(jnp.maximum(weight, _TINY)) - jnp.log(jnp.maximum(total - weight, rest))

    odds_wanted = log_odds(wanted)

    def probe(at: _Bracket):
        logit_low, logit_high = from_ordered(at.low), from_ordered(at.high)
        # Without a finite low end the line goes through the last two high ones.
        known = logit_low > -jnp.inf
        logit_other = jnp.where(known, logit_low, at.logit_before)
        odds_other = jnp.where(known, at.odds_low, at.odds_before)
        slope = (logit_high - logit_other) / (at.odds_high - odds_other)
        logit = logit_high - at.odds_high * slope
        logit = jnp.where(at.passes == 0, guess, logit)
        drawn = (logit == logit) & (at.passes < _INTERPOLATED)
        key = jnp.where(drawn, ordered(logit), _middle(at.low, at.high))
        return jnp.maximum(jnp.minimum(key, at.high - 1), at.low)

    def narrow(at: _Bracket):
        key = probe(at)
        weight, nearest = look(key, wanted)
        odds = log_odds(weight) - odds_wanted
        holds, unsure = weight < wanted, at.low < at.high
        down, up = unsure & holds, unsure & ~holds
        return _Bracket(
            passes=at.passes + 1,
            low=jnp.where(up, jnp.maximum(jnp.minimum(nearest, at.high), key + 1), at.low),
            high=jnp.where(down, jnp.minimum(jnp.maximum(nearest, at.low), key), at.high),
            odds_low=jnp.where(up, odds, at.odds_low * jnp.where(at.side > 0, 0.5, 1.0)),
            odds_high=jnp.where(down, odds, at.odds_high * jnp.where(at.side < 0, 0.5, 1.0)),
            logit_before=jnp.where(down, from_ordered(at.high), at.logit_before),
            odds_before=jnp.where(down, at.odds_high, at.odds_before),
            side=jnp.where(holds, 1, -1),
        )

    peak_odds = log_odds(jnp.ones_like(total)) - odds_wanted
    bracket = jax.lax.while_loop(
        lambda at: any_row(at.low < at.high),
        narrow,
        _Bracket(
            passes=np.int32(0),
            low=low,
            high=high,
            odds_low=log_odds(total) - odds_wanted,
            odds_high=peak_odds,
            logit_before=from_ordered(high),
            odds_before=peak_odds,
            side=jnp.zeros_like(high),
        ),
    )
    return bracket.low, bracket.passes


def halve(
    look: Look,
    low: jax.Array,
    high: jax.Array,
    wanted: jax.Array,
    *,
    any_row: Callable[[jax.Array], jax.Array] = jnp.any,
) -> jax.Array:
    """Finds the threshold in up to 32 passes, of which nothing but the weight is used."""

    def narrow(bounds):
        low, high = bounds
        middle = _middle(low, high)
        weight, _ = look(middle, wanted)
        holds, unsure = weight < wanted, low < high
        return jnp.where(unsure & ~holds, middle + 1, low), jnp.where(unsure & holds, middle, high)

    # Not high - low > 0, which overflows.
    return jax.lax.while_loop(lambda at: any_row(at[0] < at[1]), narrow, (low, high))[0]


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """The floor of the mean, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)
