"""The decoder as the rollout runs it: one token a row, per-layer weights and caches, layers
unrolled.

Training stacks the layers and scans over them. Inside a decode loop a stacked array would be copied
layer by layer, so the weights are unstacked once, when the rollout takes over the trainer's
weights.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Block, Decoder, rms_norm
from jaxconv.models.heads import ActorCritic
from jaxconv.models.rope import rope_tables

Cache = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values of each layer, [B, K, S, h]: row, key head, position, head width."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeWeights:
    """A decoder in rollout layout, in the compute dtype; the value head stays float32.

    Attributes:
        embed: [V, D].
        layers: one block a layer.
        final_norm: [D].
        head: [D, V].
        value_kernel: [D], zeros when the model has no value head.
        value_bias: scalar.
    """

    embed: jax.Array
    layers: tuple[Block, ...]
    final_norm: jax.Array
    head: jax.Array
    value_kernel: jax.Array
    value_bias: jax.Array


@jax.jit
def unstack(model: Decoder | ActorCritic) -> DecodeWeights:
    """Copies a model's weights into rollout layout."""
    decoder = model.decoder if isinstance(model, ActorCritic) else model
    config = decoder.config
    dtype = jnp.dtype(config.dtype)
    layers = jax.tree.map(lambda w: w.astype(dtype), decoder.layers)
    if isinstance(model, ActorCritic):
        kernel, bias = model.value_head.kernel[...][:, 0], model.value_head.bias[...].reshape(())
    else:
        kernel, bias = jnp.zeros(config.embed_dim), jnp.zeros(())
    return DecodeWeights(
        embed=decoder.embed[...].astype(dtype),
        layers=tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(config.num_layers)),
        final_norm=decoder.final_norm[...].astype(dtype),
        head=decoder.head().astype(dtype),
        value_kernel=kernel,
        value_bias=bias,
    )


def empty_cache(config: DecoderConfig, rows: int, length: int) -> Cache:
    """Zeros [rows, K, length, Dh] for keys and values of every layer, in the compute dtype."""
    shape = (rows, config.num_kv_heads, length, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    return tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )


def decode_step(
    weights: DecodeWeights,
    config: DecoderConfig,
    cache: Cache,
    tokens_B: jax.Array,
    positions_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Feeds one token a row at that row's own position.

    A row at a position outside the cache writes nothing. Returns the hidden states after the final
    norm [B, D] and the cache with the new keys and values in place.
    """
    rows = jnp.arange(tokens_B.shape[0])
    cos, sin = rope_tables(config, positions_B[:, None])
    visible_BS = jnp.arange(cache[0][0].shape[2]) <= positions_B[:, None]
    at = (rows, slice(None), positions_B)
    x_B1D = weights.embed[tokens_B][:, None]
    layers = []
    for block, (k_BKSh, v_BKSh) in zip(weights.layers, cache, strict=True):
        q, k, v = block.qkv(x_B1D, cos, sin)
        k_BKSh = k_BKSh.at[at].set(k[:, 0], mode="drop", unique_indices=True)
        v_BKSh = v_BKSh.at[at].set(v[:, 0], mode="drop", unique_indices=True)
        x_B1D = x_B1D + block.attention_out(attend_cache(q, k_BKSh, v_BKSh, visible_BS[:, None]))
        x_B1D = x_B1D + block.mlp(x_B1D)
        layers.append((k_BKSh, v_BKSh))
    return rms_norm(x_B1D[:, 0], weights.final_norm, config.norm_eps), tuple(layers)


def prefill(
    weights: DecodeWeights,
    config: DecoderConfig,
    cache: Cache,
    tokens_NT: jax.Array,
    rows_N: jax.Array,
    start_N: jax.Array,
    count_N: jax.Array,
) -> Cache:
    """Writes the keys and values of a piece of some rows into the cache; computes no logits at all.

    Args:
        tokens_NT: int32, the first `count_N` of each row are real.
        rows_N: cache rows, distinct; a row outside the cache is padding and is dropped.
        start_N: position of the first token of each piece; what stands before it is in the cache.
        count_N: number of real tokens.
    """
    length = cache[0][0].shape[2]
    steps_T = jnp.arange(tokens_NT.shape[1])
    positions_NT = start_N[:, None] + steps_T
    cos, sin = rope_tables(config, positions_NT)
    visible_NTS = jnp.arange(length) <= positions_NT[..., None]
    # Padding columns are written nowhere: their position is the first one outside the cache.
    write_NT = jnp.where(steps_T < count_N[:, None], positions_NT, length)
    at = (rows_N[:, None], slice(None), write_NT)
    x_NTD = weights.embed[tokens_NT]
    layers = []
    for block, (k_BKSh, v_BKSh) in zip(weights.layers, cache, strict=True):
        q, k, v = block.qkv(x_NTD, cos, sin)
        k_BKSh = k_BKSh.at[at].set(k, mode="drop")
        v_BKSh = v_BKSh.at[at].set(v, mode="drop")
        k_NKSh = k_BKSh.at[rows_N].get(mode="clip")
        v_NKSh = v_BKSh.at[rows_N].get(mode="clip")
        x_NTD = x_NTD + block.attention_out(attend_cache(q, k_NKSh, v_NKSh, visible_NTS))
        x_NTD = x_NTD + block.mlp(x_NTD)
        layers.append((k_BKSh, v_BKSh))
    return tuple(layers)


@jax.named_scope("attend_cache")
def attend_cache(
    q_BTHh: jax.Array, k_BKSh: jax.Array, v_BKSh: jax.Array, visible_BTS: jax.Array
) -> jax.Array:
    """Grouped-query softmax attention over a cache in row, head, position order. [B, T, H, h]."""
    b, t, heads, width = q_BTHh.shape
    kv_heads = k_BKSh.shape[1]
    q_BTKGh = q_BTHh.reshape(b, t, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgh,bksh->bkgts", q_BTKGh, k_BKSh, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * width**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BKSh.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", probabilities, v_BKSh).reshape(b, t, heads, width)
