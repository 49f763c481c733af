"""Bidirectional encoders of the BERT, RoBERTa and MPNet families in Flax NNX.

As in `decoder.py`, NNX declares the weights and plain JAX runs them. Suffixes: B rows, T tokens,
S keys, D width, H heads, h head width, L layers. There is no dropout.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxconv.models.encoder_config import RELATIVE_BUCKETS, EncoderConfig
from jaxconv.models.sharding import look_up, on_each_device, project, project_all
from jaxconv.models.weights import normal, ones, weight, zeros

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # By erf: `jax.nn.gelu` takes erfc, which costs a CPU several times as much.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype))),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Queries, keys and values [B, T, H, h] to what attention finds, [B, T, H, h]."""

_FARTHEST = 128  # tokens apart from which MPNet's relative positions are all the same


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std * scale + bias over the last axis, in float32, returned in x's dtype."""
    x_f32 = x.astype(jnp.float32)
    mean = jnp.mean(x_f32, axis=-1, keepdims=True)
    centered = x_f32 - mean
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


def attention(
    q_BTHh: jax.Array,
    k_BTHh: jax.Array,
    v_BTHh: jax.Array,
    segment_ids_BT: jax.Array,
    bias_HTT: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of every token to all of its own segment, [B, T, H, h].

    Scores and softmax are float32. Padding is a segment of its own.

    Args:
        q_BTHh, k_BTHh, v_BTHh: queries, keys and values.
        segment_ids_BT: int.
        bias_HTT: float32 [H, T, S], added to the scores.
    """

    def local(q_BTHh, k_BTHh, v_BTHh, segment_ids_BT, *bias):
        q_BTHh = q_BTHh * jnp.asarray(q_BTHh.shape[-1] ** -0.5, q_BTHh.dtype)
        scores_BHTS = jnp.einsum(
            "bthk,bshk->bhts", q_BTHh, k_BTHh, preferred_element_type=jnp.float32
        )
        if bias:
            scores_BHTS = scores_BHTS + bias[0]
        own_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        scores_BHTS = jnp.where(own_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BTHh.dtype)
        return jnp.einsum("bhts,bshk->bthk", probabilities, v_BTHh)

    bias = () if bias_HTT is None else (bias_HTT,)
    return on_each_device(local, q_BTHh, k_BTHh, v_BTHh, segment_ids_BT, *bias)


def relative_buckets(length: int) -> np.ndarray:
    """int32 [T, S]: the row of MPNet's table for a key so far from a query.

    Each direction has half of the rows: one for each of the nearest distances, then ever wider
    ones up to `_FARTHEST` (Raffel et al. 2020, arXiv 1910.10683, section 2.1).
    """
    position = np.arange(length)
    behind_TS = position[:, None] - position[None, :]
    rows = RELATIVE_BUCKETS // 2
    exact = rows // 2
    distance = np.abs(behind_TS)
    # In the order and the precision of `transformers`: a boundary is where rounding puts it.
    share = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    share = share / np.float32(math.log(_FARTHEST / exact)) * np.float32(rows - exact)
    far = np.minimum(exact + share.astype(np.int32), rows - 1)
    row = np.where(distance < exact, distance, far) + np.where(behind_TS < 0, rows, 0)
    return row.astype(np.int32)


class EncoderBlock(nnx.Module):
    """One layer: attention, then an MLP, each with a residual sum and a layer norm after it."""

    def __init__(self, config: EncoderConfig, key: jax.Array):
        self.config = config
        d, f, heads, h = config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim
        keys = iter(jax.random.split(key, 16))
        names = _MPNET_NAMES if config.family == "mpnet" else _BERT_NAMES

        def linear(shape, axes, name, inputs):
            """A linear map and its bias."""
            hf, init = f"encoder.layer.{{layer}}.{names.get(name, name)}", normal(config.init_std)
            w = weight(next(keys), shape, axes=axes, hf=f"{hf}.weight", init=init, inputs=inputs)
            out, out_axes = shape[inputs:], axes[inputs:]
            return w, weight(next(keys), out, axes=out_axes, hf=f"{hf}.bias", init=zeros)

        def norm(name):
            return _norm(next(keys), d, f"encoder.layer.{{layer}}.{names.get(name, name)}")

        head_axes = ("heads", "head_dim")
        self.q, self.bq = linear((d, heads, h), ("embed", *head_axes), "query", 1)
        self.k, self.bk = linear((d, heads, h), ("embed", *head_axes), "key", 1)
        self.v, self.bv = linear((d, heads, h), ("embed", *head_axes), "value", 1)
        self.o, self.bo = linear((heads, h, d), (*head_axes, "embed"), "attention_output", 2)
        self.attn_norm, self.attn_norm_bias = norm("attention_norm")
        self.up, self.b_up = linear((d, f), ("embed", "mlp"), "intermediate.dense", 1)
        self.down, self.b_down = linear((f, d), ("mlp", "embed"), "output.dense", 1)
        self.mlp_norm, self.mlp_norm_bias = norm("output.LayerNorm")

    def __call__(self, x_BTD: jax.Array, attend: Attend) -> jax.Array:
        """[B, T, D] to the same; `attend` says what a token sees."""
        eps = self.config.norm_eps
        projected = project_all(x_BTD, self.q[...], self.k[...], self.v[...])
        q, k, v = (
            y.reshape(*y.shape[:-1], *b.shape) + b[...].astype(y.dtype)
            for y, b in zip(projected, (self.bq, self.bk, self.bv), strict=True)
        )
        attended = attend(q, k, v)
        attended = attended.reshape(*attended.shape[:-2], -1)
        out = project(attended, self.o[...], inputs=2) + self.bo[...].astype(x_BTD.dtype)
        x_BTD = layer_norm(x_BTD + out, self.attn_norm[...], self.attn_norm_bias[...], eps)
        up = project(x_BTD, self.up[...]) + self.b_up[...].astype(x_BTD.dtype)
        up = _ACTIVATIONS[self.config.activation](up)
        down = project(up, self.down[...]) + self.b_down[...].astype(x_BTD.dtype)
        return layer_norm(x_BTD + down, self.mlp_norm[...], self.mlp_norm_bias[...], eps)


class Encoder(nnx.Module):
    """Tokens to hidden states. Weights are float32; `config.dtype` is used to compute.

    Args:
        config: the architecture.
        key: typed PRNG key for the initial weights.
    """

    def __init__(self, config: EncoderConfig, key: jax.Array):
        self.config = config
        keys = iter(jax.random.split(key, 8))
        d, init = config.embed_dim, normal(config.init_std)

        def table(rows, axis, name):
            axes = (axis, None if axis == "buckets" else "embed")
            width = config.num_heads if axis == "buckets" else d
            return weight(next(keys), (rows, width), axes=axes, hf=f"{name}.weight", init=init)

        self.embed = table(config.vocab_size, "vocab", "embeddings.word_embeddings")
        self.positions = table(config.max_positions, "positions", "embeddings.position_embeddings")
        if config.token_types:
            self.types = table(config.token_types, "types", "embeddings.token_type_embeddings")
        self.embed_norm, self.embed_norm_bias = _norm(next(keys), d, "embeddings.LayerNorm")
        self.layers = jax.vmap(lambda k: EncoderBlock(config, k))(
            jax.random.split(next(keys), config.num_layers)
        )
        if config.relative_buckets:
            self.relative = table(
                config.relative_buckets, "buckets", "encoder.relative_attention_bias"
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        token_types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states of the last layer, [B, T, D] in `config.dtype`.

        Args:
            tokens_BT: int token ids in [0, V).
            positions_BT: int position of each token in its own text, from 0; along the row by
                default. Tokens of a text must lie in order beside each other.
            segment_ids_BT: int; a token sees the tokens of its own segment only, so texts packed
                into a row do not mix and padding is seen by no text. None: each row is a text.
            token_types_BT: int, 0 by default; only families with token types read it.
        """
        x_BTD = self.embedded(tokens_BT, positions_BT, token_types_BT)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros_like(tokens_BT)
        bias_HTT = self.relative_bias(tokens_BT.shape[1])

        def attend(q, k, v):
            return attention(q, k, v, segment_ids_BT, bias_HTT)

        def layer(x_BTD, block):
            return block(x_BTD, attend), None

        return jax.lax.scan(layer, x_BTD, self.layers)[0]

    def embedded(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        token_types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the first layer reads, [B, T, D] in `config.dtype`; arguments of `__call__`."""
        config = self.config
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = look_up(self.embed[...], tokens_BT)
        x_BTD += look_up(self.positions[...], positions_BT + config.position_offset)
        if config.token_types:
            types_TD = self.types[...]
            if token_types_BT is None:
                x_BTD += types_TD[0]
            else:
                x_BTD += look_up(types_TD, token_types_BT)
        x_BTD = layer_norm(x_BTD, self.embed_norm[...], self.embed_norm_bias[...], config.norm_eps)
        return x_BTD.astype(config.dtype)

    def relative_bias(self, length: int) -> jax.Array | None:
        """float32 [H, T, S], what MPNet adds to the scores; None for the other families."""
        if not self.config.relative_buckets:
            return None
        return self.relative[...][relative_buckets(length)].transpose(2, 0, 1)


_BERT_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
}
_MPNET_NAMES = {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "attention_output": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
}


def _norm(key: jax.Array, size: int, hf: str) -> tuple[nnx.Param, nnx.Param]:
    """Scale and bias of a layer norm."""
    scale = weight(key, (size,), axes=("embed",), hf=f"{hf}.weight", init=ones)
    return scale, weight(key, (size,), axes=("embed",), hf=f"{hf}.bias", init=zeros)
