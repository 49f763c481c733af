"""Prefill attention on NVIDIA GPUs: cuDNN's fused attention, by way of jax."""

import jax
import jax.numpy as jnp

from jaxconv_kernels.prefill_attention.xla import visible


def takes(q_NTHh: jax.Array, k_BKSh: jax.Array, softcap: float | None) -> bool:
    """Whether cuDNN takes such arrays."""
    width = q_NTHh.shape[-1]
    types = {jnp.dtype(x.dtype).name for x in (q_NTHh, k_BKSh)}
    return (
        types in ({"bfloat16"}, {"float16"}) and width <= 128 and width % 8 == 0 and softcap is None
    )


def attend(
    q_NTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    rows_N: jax.Array,
    start_N: jax.Array,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """As `prefill_attention`.

    Pieces start anywhere in their rows, so what they see is a mask, [N, T, S] for all heads.
    """
    queries, keys = q_NTHh.shape[1], k_BKSh.shape[2]
    k_NSKh, v_NSKh = (
        cache.at[rows_N].get(mode="clip").swapaxes(1, 2) for cache in (k_BKSh, v_BKSh)
    )
    return jax.nn.dot_product_attention(
        q_NTHh,
        k_NSKh,
        v_NSKh,
        mask=visible(start_N, queries, keys, window)[:, None],
        scale=scale,
        implementation="cudnn",
    )
