"""A causal decoder of the Llama, Mistral, Qwen and Gemma families in Flax NNX.

NNX declares the weights; plain JAX runs them. A `Decoder` is an ordinary pytree: pass it straight
through `jax.jit`, `jax.grad`, `optax` and `jax.tree.map`. Suffixes: B rows, T tokens, D width,
H query heads, K key heads, G = H / K, h head width, F MLP width, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxconv.models.attention import layer_attention, soft_cap
from jaxconv.models.config import DecoderConfig
from jaxconv.models.rope import apply_rope, rope_tables
from jaxconv.models.sharding import FSDP, all_but_gathered, look_up, project, project_all, spec_of
from jaxconv.models.weights import normal, ones, weight, zeros

if TYPE_CHECKING:
    from jaxconv.models.lora import Adapter

Adapt = Callable[[str, jax.Array, jax.Array], jax.Array]
"""(name of a linear map, its input, its output) to the output with an adapter's part added."""


@jax.named_scope("norm")
def rms_norm(x: jax.Array, scale: jax.Array, config: DecoderConfig) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype.

    Gemma stores scale - 1 and rounds after the product, the others before it.
    """
    x_f32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    normed, scale = x_f32 * jax.lax.rsqrt(variance + config.norm_eps), scale.astype(x.dtype)
    if config.gemma:
        return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale


@jax.named_scope("embed")
def embed_tokens(embed_VD: jax.Array, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """Rows of the embedding, [..., D] in the compute dtype; Gemma's times sqrt(D) in that dtype."""
    x = look_up(embed_VD.astype(config.dtype), tokens)
    return x * jnp.asarray(config.embed_dim**0.5, x.dtype) if config.gemma else x


def _unadapted(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return y


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each behind an RMS norm and a residual sum.

    Gemma norms what both of them add, too.
    """

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        keys = iter(jax.random.split(key, 18))
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

        unit = zeros if config.gemma else ones

        def norm(size, axis, name):
            return weight(next(keys), (size,), axes=(axis,), hf=f"{prefix}{name}.weight", init=unit)

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
        if config.gemma:
            self.attn_out_norm = norm(d, "embed", "post_attention_layernorm")
            self.mlp_out_norm = norm(d, "embed", "post_feedforward_layernorm")
        before_mlp = "pre_feedforward_layernorm" if config.gemma else "post_attention_layernorm"
        self.mlp_norm = norm(d, "embed", before_mlp)
        self.gate = linear((d, f), ("embed", "mlp"), "mlp.gate_proj", 1)
        self.up = linear((d, f), ("embed", "mlp"), "mlp.up_proj", 1)
        self.down = linear((f, d), ("mlp", "embed"), "mlp.down_proj", 1, residual)
        if config.mlp_bias:
            self.b_gate = bias((f,), ("mlp",), "mlp.gate_proj")
            self.b_up = bias((f,), ("mlp",), "mlp.up_proj")
            self.b_down = bias((d,), ("embed",), "mlp.down_proj")

    @jax.named_scope("attention")
    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array, adapt: Adapt = _unadapted):
        """Normed, projected and rotated q [..., H, h]; k and v [..., K, h]; of x [..., D]."""
        config = self.config
        x = rms_norm(x, self.attn_norm[...], config)
        maps = {"q_proj": self.q, "k_proj": self.k, "v_proj": self.v}
        projected = project_all(x, *(w[...] for w in maps.values()))
        q, k, v = (
            adapt(name, x, y.reshape(*x.shape[:-1], *w.shape[1:]))
            for (name, w), y in zip(maps.items(), projected, strict=True)
        )
        if config.attention_bias:
            q, k, v = (
                x + b[...].astype(x.dtype) for x, b in ((q, self.bq), (k, self.bk), (v, self.bv))
            )
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config)
            k = rms_norm(k, self.k_norm[...], config)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    @jax.named_scope("attention")
    def attention_out(self, attended: jax.Array, adapt: Adapt = _unadapted) -> jax.Array:
        """Heads [..., H, h] back to the width: what attention adds to the residual, [..., D]."""
        attended = attended.reshape(*attended.shape[:-2], -1)
        out = adapt("o_proj", attended, project(attended, self.o[...], inputs=2))
        if self.config.attention_out_bias:
            out = out + self.bo[...].astype(out.dtype)
        return rms_norm(out, self.attn_out_norm[...], self.config) if self.config.gemma else out

    @jax.named_scope("mlp")
    def mlp(self, x: jax.Array, adapt: Adapt = _unadapted) -> jax.Array:
        """What the gated MLP adds to the residual x [..., D], [..., D].

        SwiGLU, or Gemma's GeGLU with the tanh form of GELU (Shazeer 2020, arXiv 2002.05202).
        """
        x = rms_norm(x, self.mlp_norm[...], self.config)
        gate, up = project_all(x, self.gate[...], self.up[...])
        gate, up = adapt("gate_proj", x, gate), adapt("up_proj", x, up)
        if self.config.mlp_bias:
            gate = gate + self.b_gate[...].astype(gate.dtype)
            up = up + self.b_up[...].astype(up.dtype)
        gated = (jax.nn.gelu(gate) if self.config.gemma else jax.nn.silu(gate)) * up
        down = adapt("down_proj", gated, project(gated, self.down[...]))
        if self.config.mlp_bias:
            down = down + self.b_down[...].astype(down.dtype)
        return rms_norm(down, self.mlp_out_norm[...], self.config) if self.config.gemma else down

    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        slides: jax.Array,
        adapt: Adapt = _unadapted,
    ) -> jax.Array:
        q, k, v = self.qkv(x_BTD, cos, sin, adapt)
        with jax.named_scope("attention"):
            attended = layer_attention(q, k, v, segment_ids_BT, self.config, slides)
        x_BTD = x_BTD + self.attention_out(attended, adapt)
        return x_BTD + self.mlp(x_BTD, adapt)


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
        unit = zeros if config.gemma else ones
        self.final_norm = weight(norm_key, (d,), axes=("embed",), hf="model.norm.weight", init=unit)
        if not config.tie_embeddings:
            self.lm_head = weight(
                head_key, (d, v), axes=("embed", "vocab"), hf="lm_head.weight", init=init, inputs=1
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        adapter: "Adapter | None" = None,
        dropout_seeds: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in `config.dtype`.

        Args:
            tokens_BT: int token ids in [0, V).
            positions_BT: int position of each token; counts from 0 along the row by default.
            segment_ids_BT: int; a token sees earlier tokens of its own segment only, so packed
                rows do not mix and padding (segment 0) is seen by no real token.
            adapter: low-rank terms to add to the linear maps, see `lora.py`.
            dropout_seeds: uint32 [B], of the adapter's dropout; the decoder itself has none.
        """
        config = self.config
        x_BTD = embed_tokens(self.embed[...], tokens_BT, config)
        length = tokens_BT.shape[1]
        if positions_BT is None:
            positions_BT = jnp.arange(length)[None]
        tables = rope_tables(config, positions_BT)
        sliding_tables = rope_tables(config, positions_BT, slides=True)
        slides_L = jnp.asarray([window is not None for window in config.windows])
        keys_LB = None if adapter is None else adapter.dropout_keys(dropout_seeds)

        def layer(x_BTD, weights):
            block, slides, layer_adapter, keys_B = weights
            cos, sin = tables
            if config.rope_local_theta is not None:
                cos, sin = (
                    jnp.where(slides, *pair) for pair in zip(sliding_tables, tables, strict=True)
                )
            adapt = _unadapted if layer_adapter is None else layer_adapter.bind(keys_B)
            return block(
                x_BTD, segment_ids_BT, cos, sin, slides, adapt
            ), None  # activations only: weights stay in place

        split = FSDP in spec_of(self.layers.q[...])
        if config.remat != "none" or split:
            policies = jax.checkpoint_policies
            policy = {
                "none": all_but_gathered,  # gathering again costs less than keeping
                "dots": policies.dots_with_no_batch_dims_saveable,
                "full": policies.nothing_saveable,
            }[config.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=config.unroll_layers)
        weights = (self.layers, slides_L, adapter, keys_LB)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, weights, unroll=config.unroll_layers or 1)
        return rms_norm(x_BTD, self.final_norm[...], config)

    def head(self) -> jax.Array:
        """The output matrix [D, V], float32; the transposed embedding when they are tied."""
        return self.embed[...].T if self.config.tie_embeddings else self.lm_head[...]

    @jax.named_scope("head")
    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        logits = jnp.einsum(
            "...d,dv->...v",
            hidden,
            self.head().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return soft_cap(logits, self.config.final_softcap)
