"""`prefill_attention`: one call, by the form that suits the platform."""

import jax

from jaxconv_kernels.prefill_attention import cudnn, tpu, xla

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


def running(
    implementation: str | None, q_NTHh: jax.Array, k_BKSh: jax.Array, softcap: float | None
) -> str:
    """The form that `prefill_attention` runs for arrays when it is asked for this implementation:
    "xla", "tpu" or "cudnn".

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}; it must be one of {known}")
    if implementation is None:
        implementation = jax.default_backend()
    if implementation == "gpu":
        return "cudnn" if cudnn.takes(q_NTHh, k_BKSh, softcap) else "xla"
    return "tpu" if implementation == "tpu" else "xla"


def prefill_attention(
    q_NTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    rows_N: jax.Array,
    start_N: jax.Array,
    count_N: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attends from pieces of some rows to what the cache holds of these rows, the pieces included.

    Query t of piece n stands at position start_N[n] + t of row rows_N[n] and sees the keys up to
    that position. Query heads share key heads as in `decode_attention`; scores, maxima and sums are
    float32.

    Args:
        q_NTHh: float [N, T, H, h].
        k_BKSh, v_BKSh: float [B, K, S, h], the cache, finite everywhere.
        rows_N: int [N]; one outside the cache is a piece of which nothing matters.
        start_N: int [N], at least 0.
        count_N: int [N], queries of a piece that matter; what comes out for the others is finite
            and means nothing.
        scale: factor of the scores.
        window: last keys that are seen, the own included; None is all.
        softcap: scores become softcap * tanh(scores / softcap); None is off.
        implementation: "xla" holds all scores at once; "tpu" reads the blocks of keys that a piece
            sees and holds the scores of one; "gpu" is cuDNN's fused attention for what that takes
            (16-bit, heads of at most 128 in multiples of 8, no cap) and "xla" for the rest. None
            takes the platform's.

    Returns:
        [N, T, H, h] in q's dtype.

    Raises:
        ValueError: the implementation is unknown, or the shapes do not go together.
    """
    _check(q_NTHh, k_BKSh, v_BKSh, rows_N, start_N, count_N)
    options = {"scale": scale, "window": window}
    running_form = running(implementation, q_NTHh, k_BKSh, softcap)
    if running_form == "tpu":
        return tpu.attend(
            q_NTHh, k_BKSh, v_BKSh, rows_N, start_N, count_N, softcap=softcap, **options
        )
    if running_form == "cudnn":
        return cudnn.attend(q_NTHh, k_BKSh, v_BKSh, rows_N, start_N, **options)
    return xla.attend(q_NTHh, k_BKSh, v_BKSh, rows_N, start_N, softcap=softcap, **options)


def _check(q_NTHh, k_BKSh, v_BKSh, rows_N, start_N, count_N) -> None:
    """Refuses shapes and types that do not fit, by name."""
    if q_NTHh.ndim != 4 or k_BKSh.ndim != 4 or v_BKSh.shape != k_BKSh.shape:
        raise ValueError(
            f"q has shape {q_NTHh.shape} and the caches {k_BKSh.shape} and {v_BKSh.shape}; they "
            "must be [N, T, H, h] and twice [B, K, S, h]"
        )
    pieces, _, heads, width = q_NTHh.shape
    if heads % k_BKSh.shape[1] or width != k_BKSh.shape[3]:
        raise ValueError(
            f"q has {heads} heads of {width}; they must be a multiple of the cache's "
            f"{k_BKSh.shape[1]}, of {k_BKSh.shape[3]}"
        )
    for name, x in {"rows": rows_N, "start": start_N, "count": count_N}.items():
        if x.shape != (pieces,):
            raise ValueError(f"{name} has shape {x.shape}; it must be {(pieces,)}")
    if k_BKSh.dtype != v_BKSh.dtype:
        raise ValueError(
            f"the caches are {k_BKSh.dtype} and {v_BKSh.dtype}; they must be of one type"
        )
