"""Gumbel and exponential noise as a pure function of (row key, domain, id).

The bits are threefry-2x32 of the counter (domain, id). With domain 0 and id = position they are
those of `jax.random.bits(key, (V,))` under `jax_threefry_partitionable`, jax's default; so the
Gumbel noise of domain 0 is `jax.random.gumbel(key, (V,))`, and adding it to logits and taking the
first largest is `jax.random.categorical`. Position in the batch, shard and chunk never enter.

threefry: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import jax
import jax.numpy as jnp

TOKENS, CELLS, TOKENS_IN_CELL = 0, 1, 2  # domains

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_TINY = float(jnp.finfo(jnp.float32).tiny)


def bits(keys_B2: jax.Array, domain: int, ids: jax.Array) -> jax.Array:
    """32 random bits for each id of each row.

    Args:
        keys_B2: uint32 [B, 2], threefry key data.
        domain: TOKENS, CELLS or TOKENS_IN_CELL.
        ids: int32 or uint32 [B or 1, ...].

    Returns:
        uint32 [B, ...].
    """
    wide = (-1, *(1,) * (ids.ndim - 1))
    return threefry(keys_B2[:, 0].reshape(wide), keys_B2[:, 1].reshape(wide), domain, ids)


def threefry(key0: jax.Array, key1: jax.Array, domain: int, ids: jax.Array) -> jax.Array:
    """`bits` of keys that are two uint32 arrays of a shape that broadcasts with the ids."""
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0 = key0 + jnp.uint32(domain)
    x1 = key1 + ids.astype(jnp.uint32)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0 ^ x1


def gumbel(bits: jax.Array) -> jax.Array:
    """Standard Gumbel noise from 23 of the bits, at most 15.94, as `jax.random.gumbel` makes it."""
    mantissa = (bits >> 9) | jnp.uint32(0x3F800000)
    u = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(u, _TINY)))


def exponential(bits: jax.Array) -> jax.Array:
    """Standard exponential noise from all 32 bits, from 2**-33 to 16.64; -log of it is Gumbel.

    With u = (bits + 1/2) / 2**32 it is -log(1 - u), whose small values, which decide, come from
    small u, where a float is finest. u stays below 1, which the largest words would round to. A
    backend that cannot convert a word, rounding once, converts (bits >> 16) * 65536 and the rest
    and adds them.
    """
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # The series, where 1 - u has lost the digits of u, is of steps that no backend lacks.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))
    return jnp.where(u < 2.0**-10, series, -jnp.log(1.0 - u))
