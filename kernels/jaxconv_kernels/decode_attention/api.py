"""`decode_attention`: one call, by the form that suits the platform."""

import jax

from jaxconv_kernels.decode_attention import gpu, tpu, xla

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


def running(implementation: str | None, q_BHh: jax.Array, k_BKSh: jax.Array) -> str:
    """The implementation that `decode_attention` runs for arrays when it is asked for this one.

    Raises:
        ValueError: the implementation is unknown, or does not take such arrays.
    """
    if implementation is None:
        implementation = jax.default_backend()
        if implementation == "gpu":
            hopper = jax.devices()[0].compute_capability.startswith("9.")
            return "gpu" if hopper and gpu.refusal(q_BHh, k_BKSh) is None else "xla"
        return "tpu" if implementation == "tpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}; it must be one of {known}")
    if implementation == "gpu" and (why := gpu.refusal(q_BHh, k_BKSh)) is not None:
        raise ValueError(f"decode attention on a GPU: {why}")
    return implementation


def decode_attention(
    q_BHh: jax.Array,
    k_BKh: jax.Array,
    v_BKh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    position_B: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes a new key and value a row into its cache, and attends one query to what is filled.

    Query heads n G to n G + G - 1 share key head n, where G = H / K (grouped-query attention).
    Scores, maxima and sums are float32.

    Args:
        q_BHh: float [B, H, h].
        k_BKh, v_BKh: float [B, K, h], key and value of the same token.
        k_BKSh, v_BKSh: float [B, K, S, h], the cache, in one dtype.
        position_B: int [B], at least 0: where the key and the value go, behind all that the row has
            filled. What lies behind that must be finite. A row at S or above writes nothing and
            sees the S keys of its cache alone.
        scale: factor of the scores.
        window: last keys that are seen, the own included; None is all.
        softcap: scores become softcap * tanh(scores / softcap); None is off.
        implementation: "xla" reads the whole cache; "tpu" and "gpu" read what is filled of it,
            "gpu" on Hopper GPUs. None takes the platform's; on a GPU that is "xla" for what the
            kernel does not take.

    Returns:
        What was attended [B, H, h], in q's dtype, and the cache of keys and of values. These take
        the place of the arguments where those are donated.

    Raises:
        ValueError: the implementation is unknown, or does not take such arrays.
    """
    _check(q_BHh, k_BKh, v_BKh, k_BKSh, v_BKSh, position_B)
    implementation = running(implementation, q_BHh, k_BKSh)
    options = {"scale": scale, "window": window, "softcap": softcap}
    if implementation == "tpu":
        return tpu.write_and_attend(q_BHh, k_BKh, v_BKh, k_BKSh, v_BKSh, position_B, **options)
    k_BKSh, v_BKSh = xla.write(k_BKSh, k_BKh, position_B), xla.write(v_BKSh, v_BKh, position_B)
    attend = gpu.attend if implementation == "gpu" else xla.attend
    return attend(q_BHh, k_BKSh, v_BKSh, position_B + 1, **options), k_BKSh, v_BKSh


def _check(q_BHh, k_BKh, v_BKh, k_BKSh, v_BKSh, position_B) -> None:
    """Refuses shapes and types that do not fit, by name."""
    if q_BHh.ndim != 3 or k_BKSh.ndim != 4:
        raise ValueError(
            f"q has shape {q_BHh.shape} and the cache {k_BKSh.shape}; they must be [B, H, h] and "
            "[B, K, S, h]"
        )
    rows, heads, width = q_BHh.shape
    kv_heads, length = k_BKSh.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the cache's {kv_heads}")
    fitting = {
        "key": (k_BKh, (rows, kv_heads, width)),
        "value": (v_BKh, (rows, kv_heads, width)),
        "cache of keys": (k_BKSh, (rows, kv_heads, length, width)),
        "cache of values": (v_BKSh, (rows, kv_heads, length, width)),
        "position": (position_B, (rows,)),
    }
    for name, (x, shape) in fitting.items():
        if x.shape != shape:
            raise ValueError(f"the {name} has shape {x.shape}; it must be {shape}")
    if k_BKSh.dtype != v_BKSh.dtype:
        raise ValueError(
            f"the caches are {k_BKSh.dtype} and {v_BKSh.dtype}; they must be of one type"
        )
