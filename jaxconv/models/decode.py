"""The decoder as the rollout runs it: one token a row, per-layer weights and caches, layers
unrolled.

Training stacks the layers and scans over them. Inside a decode loop a stacked array would be copied
layer by layer, so the weights are unstacked once, when the rollout takes over the trainer's
weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxconv_kernels import decode_attention, prefill_attention

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Block, Decoder, embed_tokens, rms_norm
from jaxconv.models.heads import ActorCritic
from jaxconv.models.lora import AdaptedDecoder, merged_layer
from jaxconv.models.rope import rope_tables
from jaxconv.models.sharding import loosened, on_each_device, partition_spec, shardings

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


def unstack(model: Decoder | AdaptedDecoder | ActorCritic) -> DecodeWeights:
    """Copies a model's weights into rollout layout; an adapter is merged into them.

    Of a model that is split over devices each of them gets all of the copy.
    """
    model = loosened(model)
    embed, *rest = outer_weights(model)
    layers = range(model_config(model).num_layers)
    return DecodeWeights(embed, tuple(rollout_layer(model, i) for i in layers), *rest)


def model_config(model: Decoder | AdaptedDecoder | ActorCritic) -> DecoderConfig:
    """The architecture of whatever speaks."""
    return _decoder(model).config


def outer_weights(
    model: Decoder | AdaptedDecoder | ActorCritic, *, split: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """What is in no layer: embed, final norm, head, kernel and bias of the value head.

    Args:
        model: on no Explicit mesh.
        split: leaves it split as the model is; otherwise every device of its mesh gets all of it.
    """
    return _copies(model, _mesh_of(model), split)


def rollout_layer(
    model: Decoder | AdaptedDecoder | ActorCritic, index: int, *, split: bool = False
) -> Block:
    """One layer in the compute dtype; arguments as of `outer_weights`."""
    mesh = _mesh_of(model)
    return _rollout_layer(_decoder(model), _on_mesh(index, mesh), mesh, split)


def _on_mesh(index: int, mesh: Mesh | None) -> jax.Array:
    """A number on every device, put there by name: what is sent of itself a guard may forbid."""
    if mesh is None:
        return jax.device_put(np.int32(index))
    whole = NamedSharding(mesh, P())
    copies = [jax.device_put(np.int32(index), device) for device in whole.addressable_devices]
    return jax.make_array_from_single_device_arrays((), whole, copies)


def _decoder(model: Decoder | AdaptedDecoder | ActorCritic) -> Decoder | AdaptedDecoder:
    return model.decoder if isinstance(model, ActorCritic) else model


def _base(model: Decoder | AdaptedDecoder | ActorCritic) -> Decoder:
    decoder = _decoder(model)
    return decoder.base if isinstance(decoder, AdaptedDecoder) else decoder


def _mesh_of(model: Decoder | AdaptedDecoder | ActorCritic) -> Mesh | None:
    sharding = _base(model).embed[...].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


@functools.partial(jax.jit, static_argnames=("mesh", "split"))
def _copies(model: Decoder | AdaptedDecoder | ActorCritic, mesh: Mesh | None, split: bool):
    """What is in no layer, in buffers of its own: the trainer gives its own away at an update."""
    base = _base(model)
    dtype = base.config.dtype
    if isinstance(model, ActorCritic):
        kernel, bias = model.value_head.kernel[...][:, 0], model.value_head.bias[...].reshape(())
    else:
        kernel, bias = jnp.zeros(base.config.embed_dim), jnp.zeros(())
    parts = base.embed[...], base.final_norm[...], base.head()
    copies = jax.tree.map(jnp.copy, (*(x.astype(dtype) for x in parts), kernel, bias))
    if mesh is None:
        return copies
    if not split:
        return jax.lax.with_sharding_constraint(copies, NamedSharding(mesh, P()))
    embed = partition_spec(base.embed, mesh)
    head = P(*embed[::-1]) if base.config.tie_embeddings else partition_spec(base.lm_head, mesh)
    specs = embed, P(), head, P(), P()
    return tuple(
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        for x, spec in zip(copies, specs, strict=True)
    )


@functools.partial(jax.jit, static_argnames=("mesh", "split"))
def _rollout_layer(
    decoder: Decoder | AdaptedDecoder, index: jax.Array, mesh: Mesh | None, split: bool
) -> Block:
    """One layer in the compute dtype.

    A program of its own, so that no more than one merged layer is held in float32.
    """
    layer = jax.tree.map(lambda w: w.astype(decoder.config.dtype), merged_layer(decoder, index))
    if mesh is None:
        return layer
    where = shardings(layer, mesh) if split else NamedSharding(mesh, P())
    return jax.lax.with_sharding_constraint(layer, where)


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
    x_B1D = embed_tokens(weights.embed, tokens_B[:, None], config)
    layers = []
    for block, window, (k_BKSh, v_BKSh) in zip(weights.layers, config.windows, cache, strict=True):
        cos, sin = rope_tables(config, positions_B[:, None], slides=window is not None)
        q, k, v = block.qkv(x_B1D, cos, sin)
        with jax.named_scope("decode_attention"):
            attend = functools.partial(_write_and_attend, config=config, window=window)
            attended_BHh, k_BKSh, v_BKSh = on_each_device(
                attend, q[:, 0], k_BKSh, v_BKSh, k[:, 0], v[:, 0], positions_B, results=3
            )
        x_B1D = x_B1D + block.attention_out(attended_BHh[:, None])
        x_B1D = x_B1D + block.mlp(x_B1D)
        layers.append((k_BKSh, v_BKSh))
    return rms_norm(x_B1D[:, 0], weights.final_norm, config), tuple(layers)


def _write_and_attend(q_BHh, k_BKSh, v_BKSh, k_BKh, v_BKh, positions_B, *, config, window):
    """`decode_attention` on the heads that a device has: (attended, keys, values)."""
    return decode_attention(
        q_BHh,
        k_BKh,
        v_BKh,
        k_BKSh,
        v_BKSh,
        positions_B,
        scale=config.query_scale,
        window=window,
        softcap=config.attention_softcap,
        implementation=config.implementation,
    )


@jax.named_scope("prefill")
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
    # Padding columns are written nowhere: their position is the first one outside the cache.
    write_NT = jnp.where(steps_T < count_N[:, None], positions_NT, length)
    x_NTD = embed_tokens(weights.embed, tokens_NT, config)
    layers = []
    for block, window, (k_BKSh, v_BKSh) in zip(weights.layers, config.windows, cache, strict=True):
        cos, sin = rope_tables(config, positions_NT, slides=window is not None)
        q, k, v = block.qkv(x_NTD, cos, sin)
        with jax.named_scope("prefill_attention"):
            attend = functools.partial(_write_piece_and_attend, config=config, window=window)
            attended_NTHh, k_BKSh, v_BKSh = on_each_device(
                attend, q, k_BKSh, v_BKSh, k, v, rows_N, start_N, count_N, write_NT, results=3
            )
        x_NTD = x_NTD + block.attention_out(attended_NTHh)
        x_NTD = x_NTD + block.mlp(x_NTD)
        layers.append((k_BKSh, v_BKSh))
    return tuple(layers)


def _write_piece_and_attend(
    q, k_BKSh, v_BKSh, k, v, rows_N, start_N, count_N, write_NT, *, config, window
):
    """A layer of `prefill` on the heads that a device has: (attended, keys, values)."""
    # With a slice over the heads a TPU would keep the cache in another layout, and copy all of it.
    heads_K = jnp.arange(k_BKSh.shape[1])
    at_NKT = (rows_N[:, None, None], heads_K[:, None], write_NT[:, None])
    k_BKSh = k_BKSh.at[at_NKT].set(k.swapaxes(1, 2), mode="drop")
    v_BKSh = v_BKSh.at[at_NKT].set(v.swapaxes(1, 2), mode="drop")
    attended_NTHh = prefill_attention(
        q,
        k_BKSh,
        v_BKSh,
        rows_N,
        start_N,
        count_N,
        scale=config.query_scale,
        window=window,
        softcap=config.attention_softcap,
        implementation=config.implementation,
    )
    return attended_NTHh, k_BKSh, v_BKSh
