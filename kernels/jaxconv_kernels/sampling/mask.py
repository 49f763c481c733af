"""The packed bitmask of allowed tokens: one bit a token, as grammar engines hand it over."""

import jax
import jax.numpy as jnp


def pack_mask(allowed: jax.Array) -> jax.Array:
    """Packs bool [B, V] to uint32 [B, ceil(V / 32)]: bit i of word w allows token 32 w + i.

    Raises:
        ValueError: it is not bool (a mask to add to logits is another thing) or not [B, V].
    """
    if allowed.ndim != 2 or allowed.dtype != bool:
        raise ValueError(f"allowed is {allowed.dtype}{list(allowed.shape)}; it must be bool[B, V]")
    rows, vocab = allowed.shape
    padded = jnp.pad(allowed, ((0, 0), (0, -vocab % 32)))
    bits = padded.reshape(rows, -1, 32).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack_mask(words: jax.Array, vocab: int) -> jax.Array:
    """The inverse of `pack_mask`: bool [B, V]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (bits != 0).reshape(words.shape[0], -1)[:, :vocab]


def allowed_at(words: jax.Array, tokens: jax.Array) -> jax.Array:
    """The bits of tokens int [B, N], each in its row: bool [B, N]."""
    word = jnp.take_along_axis(words, tokens >> 5, axis=1, mode="clip")
    return ((word >> (tokens & 31).astype(jnp.uint32)) & 1) != 0
