"""Prefill attention in plain jax.numpy: the definition, and what a CPU runs."""

import jax
import jax.numpy as jnp


def visible(start_N: jax.Array, queries: int, keys: int, window: int | None) -> jax.Array:
    """Which keys each query sees, bool [N, T, S]."""
    position_NT = start_N[:, None] + jnp.arange(queries)
    distance_NTS = position_NT[..., None] - jnp.arange(keys)
    visible_NTS = distance_NTS >= 0
    return visible_NTS if window is None else visible_NTS & (distance_NTS < window)


def attend(
    q_NTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    rows_N: jax.Array,
    start_N: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """As `prefill_attention`; holds the scores of all queries, and copies of the rows."""
    n, queries, heads, width = q_NTHh.shape
    kv_heads, keys = k_BKSh.shape[1:3]
    k_NKSh, v_NKSh = (cache.at[rows_N].get(mode="clip") for cache in (k_BKSh, v_BKSh))
    q_NTKGh = q_NTHh.reshape(n, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("ntkgh,nksh->nkgts", q_NTKGh, k_NKSh, preferred_element_type=jnp.float32)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible_NTS = visible(start_N, queries, keys, window)
    scores = jnp.where(visible_NTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_NKSh.dtype)
    out_NTKGh = jnp.einsum("nkgts,nksh->ntkgh", probabilities, v_NKSh)
    return out_NTKGh.reshape(q_NTHh.shape).astype(q_NTHh.dtype)
