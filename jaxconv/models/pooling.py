"""From the hidden states of a text's tokens to its embedding."""

import jax
import jax.numpy as jnp

from jaxconv.data.text_rows import TextRows
from jaxconv.errors import Refused

POOLINGS = ("mean", "cls", "lasttoken")


def pool(hidden_RWD: jax.Array, rows: TextRows, pooling: str) -> jax.Array:
    """One float32 vector [P, D] a text.

    Args:
        hidden_RWD: hidden states of packed rows.
        rows: where each text lies.
        pooling: "mean" over the tokens, "cls" (the first one) or "lasttoken".
    """
    _known(pooling)
    hidden_ND = hidden_RWD.reshape(-1, hidden_RWD.shape[-1]).astype(jnp.float32)
    if pooling == "cls":
        return hidden_ND[rows.first]
    if pooling == "lasttoken":
        return hidden_ND[rows.first + jnp.maximum(rows.length - 1, 0)]
    texts = rows.first.shape[0]
    # Padding belongs to one text more, which is dropped.
    total_PD = jax.ops.segment_sum(hidden_ND, rows.owner.reshape(-1), texts + 1)[:-1]
    return total_PD / jnp.maximum(rows.length, 1)[:, None]


def pool_rows(hidden_BTD: jax.Array, length_B: jax.Array, pooling: str) -> jax.Array:
    """`pool` where each row is a text with padding behind it, float32 [B, D]."""
    _known(pooling)
    hidden_BTD = hidden_BTD.astype(jnp.float32)
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "lasttoken":
        last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
    inside_BT = jnp.arange(hidden_BTD.shape[1]) < length_B[:, None]
    total_BD = jnp.sum(jnp.where(inside_BT[..., None], hidden_BTD, 0.0), axis=1)
    return total_BD / jnp.maximum(length_B, 1)[:, None]


def unit(x: jax.Array) -> jax.Array:
    """x over its length along the last axis; zeros stay zeros, with a gradient of zero."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    is_short = squared < 1e-24
    return jnp.where(is_short, 0.0, x * jax.lax.rsqrt(jnp.where(is_short, 1.0, squared)))


def cut(x: jax.Array, dim: int | None, *, normalize: bool) -> jax.Array:
    """The first `dim` numbers of embeddings [..., D], of unit length if asked for.

    Models trained for it (Matryoshka: Kusupati et al. 2022, arXiv 2205.13147) keep most of what
    they know in the first numbers.
    """
    x = x if dim is None else x[..., :dim]
    return unit(x) if normalize else x


def _known(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise Refused(f"pooling is {pooling!r}; it may be {', '.join(POOLINGS)}")
