"""A causal decoder of the Llama, Qwen2 and Qwen3 families in Flax NNX.

NNX declares the weights; plain JAX runs them. A `Decoder` is an ordinary pytree: pass it straight
through `jax.jit`, `jax.grad`, `optax` and `jax.tree.map`. Suffixes: B rows, T tokens, D width,
H query heads, K key heads, G = H / K, h head width, F MLP width, V vocabulary, L layers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxconv.models.config import DecoderConfig
from jaxconv.models.rope import apply_rope, rope_tables
from jaxconv.models.weights import normal, ones, weight, zeros

_QUERY_BLOCKS = 4
_BLOCKED_LENGTH = 64  # tokens from which blocks of queries pay


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""
    x_f32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    return (x_f32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale.astype(x.dtype)


def causal_attention(
    q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Grouped-query softmax attention, [B, T, H, h]; scores and softmax in float32.

    A query sees keys of its own segment up to its own position. Queries go in blocks, each against
    the keys up to its end only: four blocks skip three eighths of the scores.
    """
    b, t, heads, width = q_BTHh.shape
    kv_heads = k_BTKh.shape[2]
    q_BTHh = q_BTHh * jnp.asarray(width**-0.5, q_BTHh.dtype)
    q_BKGTh = q_BTHh.reshape(b, t, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    k_BKTh, v_BKTh = k_BTKh.transpose(0, 2, 1, 3), v_BTKh.transpose(0, 2, 1, 3)

    def attend(start: int, end: int) -> jax.Array:
        scores = jnp.einsum(
            "bkgth,bksh->bkgts",
            q_BKGTh[:, :, :, start:end],
            k_BKTh[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        mask_BTS = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
        if segment_ids_BT is not None:
            mask_BTS &= segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
        scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BKTh.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", probabilities, v_BKTh[:, :, :end])

    size = -(-t // _QUERY_BLOCKS) if t >= _BLOCKED_LENGTH else t
    blocks = [attend(start, min(start + size, t)) for start in range(0, t, size)]
    attended = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return attended.transpose(0, 3, 1, 2, 4).reshape(b, t, heads, width)


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each behind an RMS norm and a residual sum."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        keys = iter(jax.random.split(key, 16))
        prefix = "model.layers.{layer}."
        # Each layer adds two terms to the residual stream; scaling them keeps its variance.
        residual = (2 * config.num_layers) ** -0.5

        def linear(shape, axes, name, inputs, scale=1.0):
            fan_in = 1
            for size in shape[:inputs]:
                fan_in *= size
            init = normal(scale * fan_in**-0.5)
            return weight(
                next(keys), shape, axes=axes, hf=f"{prefix}{name}.weight", init=init, inputs=inputs
            )

        def norm(size, axis, name):
            return weight(next(keys), (size,), axes=(axis,), hf=f"{prefix}{name}.weight", init=ones)

        def bias(shape, axes, name):
            return weight(next(keys), shape, axes=axes, hf=f"{prefix}{name}.bias", init=zeros)

        self.attn_norm = norm(d, "embed", "input_layernorm")
        q_axes, kv_axes = ("heads", "head_dim"), ("kv_heads", "head_dim")
        self.q = linear((d, heads, h), ("embed", *q_axes), "self_attn.q_proj", 1)
        self.k = linear((d, kv_heads, h), ("embed", *kv_axes), "self_attn.k_proj", 1)
        self.v = linear((d, kv_heads, h), ("embed", *kv_axes), "self_attn.v_proj", 1)
        self.o = linear((heads, h, d), (*q_axes, "embed"), "self_attn.o_proj", 2, residual)
        if config.attention_bias:
            self.bq = bias((heads, h), q_axes, "self_attn.q_proj")
            self.bk = bias((kv_heads, h), kv_axes, "self_attn.k_proj")
            self.bv = bias((kv_heads, h), kv_axes, "self_attn.v_proj")
        if config.attention_out_bias:
            self.bo = bias((d,), ("embed",), "self_attn.o_proj")
        if config.qk_norm:
            self.q_norm = norm(h, "head_dim", "self_attn.q_norm")
            self.k_norm = norm(h, "head_dim", "self_attn.k_norm")
        self.mlp_norm = norm(d, "embed", "post_attention_layernorm")
        self.gate = linear((d, f), ("embed", "mlp"), "mlp.gate_proj", 1)
        self.up = linear((d, f), ("embed", "mlp"), "mlp.up_proj", 1)
        self.down = linear((f, d), ("mlp", "embed"), "mlp.down_proj", 1, residual)
        if config.mlp_bias:
            self.b_gate = bias((f,), ("mlp",), "mlp.gate_proj")
            self.b_up = bias((f,), ("mlp",), "mlp.up_proj")
            self.b_down = bias((d,), ("embed",), "mlp.down_proj")

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array):
        """Normed, projected and rotated q [..., H, h]; k and v [..., K, h]; of x [..., D]."""
        config = self.config
        x = rms_norm(x, self.attn_norm[...], config.norm_eps)
        q, k, v = (_project(x, w[...]) for w in (self.q, self.k, self.v))
        if config.attention_bias:
            q, k, v = (
                x + b[...].astype(x.dtype) for x, b in ((q, self.bq), (k, self.bk), (v, self.bv))
            )
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def attention_out(self, attended: jax.Array) -> jax.Array:
        """Heads [..., H, h] back to the width, [..., D]."""
        o_ND = self.o[...].reshape(-1, self.config.embed_dim)
        out = _project(attended.reshape(*attended.shape[:-2], -1), o_ND)
        return out + self.bo[...].astype(out.dtype) if self.config.attention_out_bias else out

    def mlp(self, x: jax.Array) -> jax.Array:
        """SwiGLU (Shazeer 2020, arXiv 2002.05202) of the normed x [..., D], [..., D]."""
        x = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gate, up = _project(x, self.gate[...]), _project(x, self.up[...])
        if self.config.mlp_bias:
            gate = gate + self.b_gate[...].astype(gate.dtype)
            up = up + self.b_up[...].astype(up.dtype)
        down = _project(jax.nn.silu(gate) * up, self.down[...])
        return down + self.b_down[...].astype(down.dtype) if self.config.mlp_bias else down

    def __call__(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None, cos: jax.Array, sin: jax.Array
    ) -> jax.Array:
        q, k, v = self.qkv(x_BTD, cos, sin)
        x_BTD = x_BTD + self.attention_out(causal_attention(q, k, v, segment_ids_BT))
        return x_BTD + self.mlp(x_BTD)


def _project(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] through w [D, ...] as one flat matmul, in x's dtype."""
    d = x.shape[-1]
    flat = x.reshape(-1, d) @ w.reshape(d, -1).astype(x.dtype)
    return flat.reshape(*x.shape[:-1], *w.shape[1:])


class Decoder(nnx.Module):
    """Tokens to hidden states to logits. Weights are float32; `config.dtype` is used to compute.

    Args:
        config: the architecture.
        key: typed PRNG key for the initial weights.
    """

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        embed_key, layer_key, norm_key, head_key = jax.random.split(key, 4)
        v, d = config.vocab_size, config.embed_dim
        init = normal(d**-0.5)
        self.embed = weight(
            embed_key, (v, d), axes=("vocab", "embed"), hf="model.embed_tokens.weight", init=init
        )
        self.layers = jax.vmap(lambda k: Block(config, k))(
            jax.random.split(layer_key, config.num_layers)
        )
        self.final_norm = weight(norm_key, (d,), axes=("embed",), hf="model.norm.weight", init=ones)
        if not config.tie_embeddings:
            self.lm_head = weight(
                head_key, (d, v), axes=("embed", "vocab"), hf="lm_head.weight", init=init, inputs=1
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in `config.dtype`.

        Args:
            tokens_BT: int token ids in [0, V).
            positions_BT: int position of each token; counts from 0 along the row by default.
            segment_ids_BT: int; a token sees earlier tokens of its own segment only, so packed
                rows do not mix and padding (segment 0) is seen by no real token.
        """
        config = self.config
        x_BTD = self.embed[...].astype(config.dtype)[tokens_BT]
        length = tokens_BT.shape[1]
        if positions_BT is None:
            positions_BT = jnp.arange(length)[None]
        cos, sin = rope_tables(config, positions_BT)

        def layer(x_BTD, block):
            return block(
                x_BTD, segment_ids_BT, cos, sin
            ), None  # activations only: weights stay in place

        if config.remat != "none":
            policies = jax.checkpoint_policies
            policy = {
                "dots": policies.dots_with_no_batch_dims_saveable,
                "full": policies.nothing_saveable,
            }[config.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=config.unroll_layers)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, self.layers, unroll=config.unroll_layers or 1)
        return rms_norm(x_BTD, self.final_norm[...], config.norm_eps)

    def head(self) -> jax.Array:
        """The output matrix [D, V], float32; the transposed embedding when they are tied."""
        return self.embed[...].T if self.config.tie_embeddings else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        return jnp.einsum(
            "...d,dv->...v",
            hidden,
            self.head().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
