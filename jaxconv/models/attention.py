"""Causal self-attention over rows of tokens, by the form that suits the platform.

Training and scoring attend here; a rollout attends to its cache in `decode.py`.
"""

import jax
import jax.numpy as jnp

from jaxconv.models.config import DecoderConfig
from jaxconv.models.sharding import on_each_device

_QUERY_BLOCKS = 4
_WINDOW_BLOCKS = 8  # most blocks with a window: each is compiled by itself
_BLOCKED_LENGTH = 64  # tokens from which blocks of queries pay
_LANES = 128  # splash attention works on rows of whole multiples of this
_SPLASH_BLOCK = 512


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): about x where it is small, within (-cap, cap) everywhere."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_form(config: DecoderConfig) -> str:
    """How rows of tokens are attended to: "xla", "splash" or "cudnn".

    A TPU runs splash attention. A GPU runs cuDNN's fused attention for what that takes: 16-bit
    activations, heads of at most 128, no cap on the scores.
    """
    kernels = config.kernels if config.kernels != "auto" else jax.default_backend()
    if kernels == "tpu":
        return "splash"
    fused = config.dtype == "bfloat16" and config.head_dim <= 128 and not config.attention_softcap
    return "cudnn" if kernels == "gpu" and fused else "xla"


def layer_attention(q, k, v, segment_ids_BT, config: DecoderConfig, slides: jax.Array):
    """`causal_attention` with the window of the layer, which may be known only as it runs.

    Rows and heads may be split over devices, each of which attends to its own.
    """
    window = config.sliding_window
    if window is not None and (window >= q.shape[1] or not any(config.sliding_layers)):
        window = None

    def local(q, k, v, slides, *segment_ids):
        segments_BT = segment_ids[0] if segment_ids else None

        def attend(window):
            return lambda: causal_attention(q, k, v, segments_BT, config, window)

        if window is None or all(config.sliding_layers):
            return attend(window)()
        return jax.lax.cond(slides, attend(window), attend(None))

    segment_ids = () if segment_ids_BT is None else (segment_ids_BT,)
    return on_each_device(local, q, k, v, slides, *segment_ids)


def causal_attention(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segment_ids_BT: jax.Array | None,
    config: DecoderConfig,
    window: int | None = None,
) -> jax.Array:
    """Grouped-query softmax attention, [B, T, H, h]; scores and softmax in float32.

    A query sees keys of its own segment up to its own position, the last `window` of them if that
    is given.
    """
    attend = {"xla": _xla, "splash": splash, "cudnn": _cudnn}[attention_form(config)]
    return attend(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config, window)


def _xla(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config, window):
    """Queries go in blocks, each against the keys that it can see: four blocks skip three
    eighths of the scores, and a window short of the row skips all but about its share.

    The queries that share a key head lie in one axis Q = T G, and scores have four axes throughout:
    on a CPU the backward pass of a fifth axis costs a quarter of a training step.
    """
    b, t, heads, width = q_BTHh.shape
    kv_heads = k_BTKh.shape[2]
    group = heads // kv_heads
    q_BTHh = q_BTHh * jnp.asarray(config.query_scale, q_BTHh.dtype)
    q_BTGKh = q_BTHh.reshape(b, t, kv_heads, group, width).swapaxes(2, 3)
    q_BQKh = q_BTGKh.reshape(b, t * group, kv_heads, width)

    def attend(start: int, end: int) -> jax.Array:
        first = 0 if window is None else max(0, start - window + 1)
        scores_BKQS = jnp.einsum(
            "bqkh,bskh->bkqs",
            q_BQKh[:, start * group : end * group],
            k_BTKh[:, first:end],
            preferred_element_type=jnp.float32,
        )
        scores_BKQS = soft_cap(scores_BKQS, config.attention_softcap)
        distance_TS = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
        mask_BTS = (distance_TS >= 0)[None]
        if window is not None:
            mask_BTS &= distance_TS < window
        if segment_ids_BT is not None:
            mask_BTS &= segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, first:end]
        mask_BQS = jnp.repeat(mask_BTS, group, axis=1) if group > 1 else mask_BTS
        scores_BKQS = jnp.where(mask_BQS[:, None], scores_BKQS, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores_BKQS, axis=-1).astype(v_BTKh.dtype)
        return jnp.einsum("bkqs,bskh->bqkh", probabilities, v_BTKh[:, first:end])

    blocks = _QUERY_BLOCKS
    if window is not None:
        blocks = min(max(blocks, t // window), _WINDOW_BLOCKS)
    size = -(-t // blocks) if t >= _BLOCKED_LENGTH else t
    attended = [attend(start, min(start + size, t)) for start in range(0, t, size)]
    out_BQKh = jnp.concatenate(attended, axis=1) if len(attended) > 1 else attended[0]
    out_BTGKh = out_BQKh.reshape(b, t, group, kv_heads, width)
    return out_BTGKh.swapaxes(2, 3).reshape(b, t, heads, width)


def splash(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config, window, *, interpret=False):
    """Splash attention of jax, which skips the blocks of scores that the mask empties."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, t, heads, _ = q_BTHh.shape
    padded = -(-t // _LANES) * _LANES
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros((b, t), jnp.int32)

    def rows_of_lanes(x):
        return jnp.pad(x, ((0, 0), (0, padded - t), *((0, 0),) * (x.ndim - 2)))

    shape = (padded, padded)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (_SPLASH_BLOCK, 256, _LANES) if padded % size == 0)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    attend = kernel.make_splash_mha(
        mask=masks.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=config.attention_softcap,
        block_sizes=kernel.BlockSizes(**{f"block_{size}": block for size in sizes}),
        interpret=interpret,
    )
    q_BTHh = q_BTHh * jnp.asarray(config.query_scale, q_BTHh.dtype)
    q_BHTh, k_BKTh, v_BKTh = (
        rows_of_lanes(x).transpose(0, 2, 1, 3) for x in (q_BTHh, k_BTKh, v_BTKh)
    )
    segments_BT = rows_of_lanes(segment_ids_BT)
    segments = kernel.SegmentIds(q=segments_BT, kv=segments_BT)
    out_BHTh = jax.vmap(attend)(q_BHTh, k_BKTh, v_BKTh, segments)
    return out_BHTh.transpose(0, 2, 1, 3)[:, :t].astype(q_BTHh.dtype)


def _cudnn(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, config, window):
    """cuDNN's fused attention; packed rows pass their segments as a mask."""
    length = q_BTHh.shape[1]
    odd = ((0, 0), (0, length % 2))  # its backward pass takes rows of even length only
    q_BTHh, k_BTKh, v_BTKh = (jnp.pad(x, (*odd, (0, 0), (0, 0))) for x in (q_BTHh, k_BTKh, v_BTKh))
    mask_B1TS = None
    if segment_ids_BT is not None:
        segment_ids_BT = jnp.pad(segment_ids_BT, odd)
        mask_B1TS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    out_BTHh = jax.nn.dot_product_attention(
        q_BTHh,
        k_BTKh,
        v_BTKh,
        mask=mask_B1TS,
        scale=config.query_scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out_BTHh[:, :length]
