"""Reductions over the entries of an array that a mask selects.

Entries off the mask never reach the arithmetic, so a NaN or an infinity in padding cannot leak into
a value or a gradient. Everything is computed in float32, or in float64 where that is given.
"""

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def floating(x: jax.Array) -> jax.Array:
    """`x` as float32, whatever it was, unless it is float64 already."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def select(x: jax.Array, mask: jax.Array, fill: float = 0.0) -> jax.Array:
    """Floating `x` where `mask` holds, `fill` elsewhere. `mask` is bool or 0/1, shaped like `x`."""
    return jnp.where(jnp.asarray(mask) != 0, floating(x), fill)


def count(mask: jax.Array, axis: Axis = None) -> jax.Array:
    """How many entries `mask` selects, float32."""
    return jnp.sum(jnp.asarray(mask) != 0, axis=axis, dtype=jnp.float32)


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Sum over the selected entries; 0 where there are none."""
    return jnp.sum(select(x, mask), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Mean over the selected entries; 0 where there are none."""
    return masked_sum(x, mask, axis) / jnp.maximum(count(mask, axis), 1.0)


def masked_std(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Population standard deviation over the selected entries; 0 where there are none.

    The mean is subtracted before squaring: E[x²] − E[x]² loses its digits in float32 as soon as the
    mean is large beside the spread.
    """
    kept = jnp.asarray(mask) != 0
    total = jnp.sum(select(x, kept), axis=axis, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(kept, axis=axis, keepdims=True), 1)
    variance = masked_mean(jnp.square(select(x, kept) - mean), kept, axis)
    # sqrt has an infinite slope at 0: keep that out of gradients
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def masked_max(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Largest selected entry; −inf, the identity of max, where there are none."""
    return jnp.max(select(x, mask, -jnp.inf), axis=axis)
