"""The search for thresholds: interpolation finds what halving finds, in fewer passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxconv_kernels.sampling import cells, search, spec

CELLS = 3
TOKENS = CELLS * spec.CELL


def look_at(x, weight):
    """A pass over the rows [B, C, 16, 128], each number by a sum or a comparison of its own."""
    key = spec.ordered(x)

    def look(at_B, wanted_B):
        above = key > spec.expand(at_B, key)
        weight_B = spec.cell_total(cells.cell_sum(jnp.where(above, weight, 0)))
        below_B = jnp.max(jnp.where(above, -(2**31), key), axis=(1, 2, 3))
        above_B = jnp.min(jnp.where(above, key, 2**31 - 1), axis=(1, 2, 3))
        return weight_B, jnp.where(weight_B < wanted_B, below_B, above_B)

    return look


@functools.partial(jax.jit, static_argnames="count")
def both(x_BV, wanted, guess_B, low_B, count):
    """(threshold by interpolation, its passes, threshold by halving); wanted is a share of the
    mass, or a number of tokens."""
    x = cells.by_cell(x_BV, small=False)
    largest_B = jnp.max(x_BV, axis=1)
    weight = 1 if count else jnp.exp(x - spec.expand(cells.finite(largest_B), x))
    look = look_at(x, weight)
    total_B, _ = look(jnp.full_like(low_B, -(2**31)), 0)
    wanted_B = jnp.broadcast_to(wanted, total_B.shape).astype(total_B.dtype)
    wanted_B = wanted_B if count else wanted_B * total_B
    low_B, high_B = jnp.maximum(low_B, search.LOWEST), spec.ordered(largest_B)
    total_B = total_B.astype(jnp.float32)
    found_B, passes = search.interpolate(
        look, low_B, high_B, wanted_B, total=total_B, guess=guess_B
    )
    return found_B, passes, search.halve(look, low_B, high_B, wanted_B)


def rows_of(rng):
    """Four rows of one kind: bell-shaped, tied, tiny or huge, few, two values, or of every kind."""
    x = rng.normal(size=(4, TOKENS)) * rng.choice([1e-3, 0.5, 2, 6])
    kind = rng.integers(8)
    if kind == 1:
        x = np.round(x)  # zeros of both signs, too
    elif kind == 2:
        x *= np.exp(rng.normal(size=x.shape) * 20)
    elif kind == 3:
        x = np.where(rng.random(x.shape) < 0.999, -np.inf, x)
    elif kind == 4:
        x = np.where(rng.random(x.shape) < 0.5, x[:, :1], x[:, 1:2])
    elif kind == 5:
        x = -(rng.exponential(size=x.shape) ** 3)
    elif kind == 6:
        x = rng.integers(-(2**31), 2**31, x.shape).astype(np.int32).view(np.float32)
        x = np.where(np.isfinite(x), x, 0)
    x = np.clip(x, -3e38, 3e38).astype(np.float32)
    x[:, 0] = np.where(np.isneginf(x).all(axis=1), 0, x[:, 0])
    return x


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), count=st.booleans())
@example(seed=0, count=True)
@example(seed=0, count=False)
def test_interpolation_finds_what_halving_finds(seed, count):
    rng = np.random.default_rng(seed)
    x = rows_of(rng)
    if count:
        wanted = rng.choice([1, 2, 50, 1000, TOKENS - 1, TOKENS, TOKENS + 9])
    else:
        wanted = np.float32(rng.choice([0, 1e-3, 0.5, 0.95, 0.9999, 1, 1 + 1e-6]))
    guess = np.float32(rng.choice([np.nan, -np.inf, np.inf, 0, x.min(), x.max()], 4))
    # A bound from below is -inf, a logit of the row, or the answer at once.
    low = [search.LOWEST, int(spec.ordered(np.sort(x[0])[-9])), int(spec.ordered(x[0].max()))]
    low = np.minimum(rng.choice(low), np.asarray(spec.ordered(x.max(axis=1))))
    found, passes, expected = both(x, wanted, guess, low.astype(np.int32), count)
    np.testing.assert_array_equal(found, expected)
    assert passes <= 44


FLAT = {
    "normal, 1": lambda rng: rng.normal(size=TOKENS),
    "normal, 3": lambda rng: rng.normal(size=TOKENS) * 3,
    "bfloat16": lambda rng: np.float32(jnp.asarray(rng.normal(size=TOKENS), jnp.bfloat16)),
    "Zipf, 1.2": lambda rng: -1.2 * np.log1p(np.arange(TOKENS)),
    "equal": lambda rng: np.ones(TOKENS),
}


@pytest.mark.parametrize("kind", FLAT)
def test_flat_rows_take_few_passes(kind):
    x = np.float32(FLAT[kind](np.random.default_rng(0)))[None]
    guess = np.log(np.exp(np.float64(x)).mean()).astype(np.float32)[None]
    low = np.full(1, search.LOWEST, np.int32)
    for count, wanted in ((True, 50), (True, 2000), (False, 0.5), (False, 0.9), (False, 0.99)):
        found, passes, expected = both(x, np.float32(wanted), guess, low, count)
        np.testing.assert_array_equal(found, expected)
        assert passes <= (2 if kind == "equal" else 12), (count, wanted)
