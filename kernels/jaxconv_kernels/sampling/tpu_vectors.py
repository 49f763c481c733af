"""What a row of lanes can do in the TPU kernel: every array is [R, 128 n], a vector register or n.

A number of each row stands in all 128 lanes, so that no operation waits for a broadcast.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxconv_kernels.sampling.spec import LANES


def lane_ids(rows: int, width: int = LANES) -> jax.Array:
    """int32 [rows, width], the position along the lanes."""
    return lax.broadcasted_iota(jnp.int32, (rows, width), 1)


def spread(x_R1: jax.Array) -> jax.Array:
    """A number of each row in every lane, [R, 128]."""
    return jnp.broadcast_to(x_R1, (x_R1.shape[0], LANES))


def widen(x_RL: jax.Array, like: jax.Array) -> jax.Array:
    """[R, 128] repeated to the width of `like`."""
    return jnp.concatenate([x_RL] * (like.shape[1] // LANES), axis=1)


def vectors(x: jax.Array) -> list[jax.Array]:
    """[R, 128 n] as n arrays [R, 128]."""
    return [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]


def fold(combine, x: jax.Array, start: jax.Array | None = None) -> jax.Array:
    """Combines the vectors of [R, 128 n], in order, to [R, 128]."""
    return functools.reduce(combine, vectors(x) if start is None else [start, *vectors(x)])


def row_max(x: jax.Array) -> jax.Array:
    """The largest float32 of each row, spread."""
    return spread(jnp.max(fold(jnp.maximum, x), axis=1, keepdims=True))


def row_first(at: jax.Array, ids: jax.Array) -> jax.Array:
    """The lowest of the ids (int32, below 2**24) at which `at` is true, spread; 2**24 for none."""
    # There is no reduction of integers; float32 holds these exactly.
    least = fold(jnp.minimum, jnp.where(at, ids.astype(jnp.float32), float(1 << 24)))
    return spread(jnp.min(least, axis=1, keepdims=True)).astype(jnp.int32)


def lane_sum(x_RL: jax.Array) -> jax.Array:
    """The sum of each row, spread: by halves, as the specification wants it."""
    for shift in (64, 32, 16, 8, 4, 2, 1):
        x_RL = settled(x_RL)
        x_RL = x_RL + pltpu.roll(x_RL, shift, 1)
    return x_RL


def any_row(at_RL: jax.Array) -> jax.Array:
    """Whether a spread condition holds in any row: a scalar."""
    return jnp.max(jnp.where(at_RL, 1.0, 0.0)) > 0


def settled(x):
    """The same arrays, for a CPU a barrier: where the kernel is interpreted, XLA would compute what
    it fuses once for each of its uses, again and again down a chain.
    """
    return lax.platform_dependent(x, mosaic=lambda x: x, default=lax.optimization_barrier)


def put(ref, lane: jax.Array | int, value_RL: jax.Array) -> None:
    """Writes a spread number into one lane of a reference [R, 128]."""
    ref[...] = jnp.where(lane_ids(len(ref)) == lane, value_RL, ref[...])
