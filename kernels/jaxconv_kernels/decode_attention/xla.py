"""Decode attention in plain jax.numpy: the definition, and what a CPU runs."""

import jax
import jax.numpy as jnp


def write(cache_BKSh: jax.Array, new_BKh: jax.Array, position_B: jax.Array) -> jax.Array:
    """The cache with `new_BKh` at the position of each row; one behind its end writes nothing."""
    at = (jnp.arange(len(position_B)), slice(None), position_B)
    return cache_BKSh.at[at].set(new_BKh, mode="drop", unique_indices=True)


def attend(
    q_BHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    length_B: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """Attends to the first `length_B` keys of each row; reads the whole cache all the same.

    Args and result are those of `decode_attention`; what lies behind `length_B` must be finite, and
    the output of a row of length 0 means nothing.
    """
    b, heads, width = q_BHh.shape
    kv_heads, keys = k_BKSh.shape[1:3]
    q_BKGh = q_BHh.reshape(b, kv_heads, heads // kv_heads, width)
    scores_BKGS = jnp.einsum("bkgh,bksh->bkgs", q_BKGh, k_BKSh, preferred_element_type=jnp.float32)
    scores_BKGS *= scale
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    distance_BS = jnp.minimum(length_B, keys)[:, None] - 1 - jnp.arange(keys)
    visible_BS = distance_BS >= 0
    if window is not None:
        visible_BS &= distance_BS < window
    scores_BKGS = jnp.where(visible_BS[:, None, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    probabilities_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSh.dtype)
    out_BKGh = jnp.einsum("bkgs,bksh->bkgh", probabilities_BKGS, v_BKSh)
    return out_BKGh.reshape(b, heads, width)
