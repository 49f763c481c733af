"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank terms beside the linear maps of a decoder.

An `Adapter` holds the low-rank weights alone. Training differentiates with respect to it, the base
stays a constant; several adapters share one base, and the base by itself is the reference model.
Targets carry Hugging Face's module names. Suffixes as in `decoder.py`; r is the rank.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Adapt, Block, Decoder
from jaxconv.models.sharding import project
from jaxconv.models.weights import named_weights, weight, zeros

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter adds: W x + scale * B A dropout(x). Hashable.

    Attributes:
        rank: r, width of the low-rank term.
        alpha: numerator of the scale, which is alpha / r.
        targets: the linear maps of every layer that get one, among `TARGETS`.
        dropout: share of the inputs of A that training sets to zero.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732), which keeps the
            size of updates at large ranks.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise Refused(f"LoRA rank is {self.rank!r}; it must be a positive integer")
        if not 0 < self.alpha < math.inf:
            raise Refused(f"LoRA alpha is {self.alpha}; it must be positive")
        if not self.targets:
            raise Refused(f"LoRA targets are empty; they may be {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                raise Refused(f"LoRA target is {target!r}; it may be {', '.join(TARGETS)}")
        if len(set(self.targets)) < len(self.targets):
            raise Refused(f"LoRA targets are {', '.join(self.targets)}; each may be named once")
        if not 0 <= self.dropout < 1:
            raise Refused(f"LoRA dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """Multiplier of the low-rank term."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nnx.Module):
    """A and B of one linear map: a [inputs..., r] and b [r, outputs...], float32.

    A starts uniform in ±1/sqrt(inputs), as torch starts a linear map; B starts at zero, so that an
    adapter changes nothing before its first update.

    Args:
        base: the (abstract) weight of one layer that it stands beside.
        rank: r.
        key: typed PRNG key.
    """

    def __init__(self, base: nnx.Param, rank: int, key: jax.Array):
        inputs, axes = base.get_metadata("inputs"), base.get_metadata("axes")
        name = "base_model.model." + base.get_metadata("hf").removesuffix(".weight")
        bound = math.prod(base.shape[:inputs]) ** -0.5

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        self.a = weight(
            key,
            (*base.shape[:inputs], rank),
            axes=(*axes[:inputs], None),
            hf=f"{name}.lora_A.weight",
            init=uniform,
            inputs=inputs,
        )
        self.b = weight(
            key,
            (rank, *base.shape[inputs:]),
            axes=(None, *axes[inputs:]),
            hf=f"{name}.lora_B.weight",
            init=zeros,
            inputs=1,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """B A x of x [..., inputs], [..., outputs] in x's dtype."""
        low = project(x, self.a[...], inputs=self.a[...].ndim - 1)
        b = self.b[...].reshape(low.shape[-1], -1).astype(x.dtype)
        # The remat policy "dots" keeps products without batch axes. This one is as large as the
        # output of the map beside it and cheap to compute again, so it gets an axis of one.
        return jax.lax.dot_general(low[None], b[None], (((low.ndim,), (1,)), ((0,), (0,))))[0]

    def product(self) -> jax.Array:
        """A B in the shape of the weight beside it, float32."""
        return jnp.tensordot(self.a[...], self.b[...], axes=1)


class Adapter(nnx.Module):
    """Low-rank weights of every target (one attribute each), stacked over layers.

    The decoder's scan over layers hands each layer its slice: an Adapter without the layer axis.

    Args:
        decoder_config: the architecture of the base.
        config: rank, scale, targets and dropout.
        key: typed PRNG key. A target's initial A does not depend on what else is a target.
    """

    def __init__(self, decoder_config: DecoderConfig, config: LoraConfig, key: jax.Array):
        self.config = config
        maps = _linear_maps(decoder_config)
        for target in config.targets:
            _, base = maps[target]
            target_key = jax.random.fold_in(key, TARGETS.index(target))
            layers = jax.vmap(lambda k, base=base: LowRank(base, config.rank, k))(
                jax.random.split(target_key, decoder_config.num_layers)
            )
            setattr(self, target, layers)

    def dropout_keys(self, seeds_B: jax.Array | None) -> jax.Array | None:
        """A key for each layer and row, [L, B]; None without dropout.

        A row's masks depend on its seed, the layer and the target alone: how rows are cut into
        micro-batches or spread over devices changes nothing.
        """
        if seeds_B is None or not self.config.dropout:
            return None
        num_layers = getattr(self, self.config.targets[0]).a.shape[0]
        # Named, so that a process's default generator changes no mask.
        keys_B = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds_B)
        of_layer = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return jax.vmap(of_layer, in_axes=(None, 0))(keys_B, jnp.arange(num_layers))

    def bind(self, keys_B: jax.Array | None) -> Adapt:
        """What one layer's slice does to that layer's linear maps; keys of `dropout_keys`."""

        def adapt(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            if name not in self.config.targets:
                return y
            if keys_B is not None:
                x = dropout(x, self.config.dropout, keys_B, TARGETS.index(name))
            return y + self.config.scale * getattr(self, name)(x).reshape(y.shape)

        return adapt


def dropout(x: jax.Array, rate: float, keys_B: jax.Array, index: int) -> jax.Array:
    """Inverted dropout of x [B, ...]: a share `rate` is zero, the rest divided by 1 - rate.

    Args:
        x: [B, ...].
        rate: in [0, 1).
        keys_B: one typed key a row.
        index: tells apart the masks that one key gives.
    """

    def keep_row(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep_row)(keys_B), x / (1 - rate), 0)


class AdaptedDecoder(nnx.Module):
    """A base and an adapter as one decoder; it refers to both and copies neither."""

    def __init__(self, base: Decoder, adapter: Adapter):
        self.base = base
        self.adapter = adapter

    @property
    def config(self) -> DecoderConfig:
        """The architecture and execution choices of the base."""
        return self.base.config

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        dropout_seeds: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] as `Decoder` gives them.

        Args:
            tokens_BT: int token ids in [0, V).
            positions_BT: see `Decoder`.
            segment_ids_BT: see `Decoder`.
            dropout_seeds: uint32 [B], one a row; None, as in evaluation, drops nothing.
        """
        return self.base(
            tokens_BT,
            positions_BT,
            segment_ids_BT,
            adapter=self.adapter,
            dropout_seeds=dropout_seeds,
        )

    def head(self) -> jax.Array:
        """The output matrix [D, V] of the base."""
        return self.base.head()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        return self.base.logits(hidden)


def merge(decoder: Decoder | AdaptedDecoder) -> Decoder:
    """A plain decoder with W + scale * A B for W; a plain decoder is returned as it is.

    The sum is taken in float32 and kept in the base's dtype. Weights that are no target are the
    base's own arrays.
    """
    if isinstance(decoder, Decoder):
        return decoder
    merged = jax.tree.map(lambda w: w, decoder.base)  # a new tree of the same arrays
    merged.layers = jax.vmap(_merge_block)(decoder.base.layers, decoder.adapter)
    return merged


def merged_layer(decoder: Decoder | AdaptedDecoder, index: int | jax.Array) -> Block:
    """One layer of `merge(decoder)`, at the cost of one layer."""
    if isinstance(decoder, Decoder):
        return jax.tree.map(lambda w: w[index], decoder.layers)
    layers = (decoder.base.layers, decoder.adapter)
    return _merge_block(*jax.tree.map(lambda w: w[index], layers))


def _merge_block(block: Block, adapter: Adapter) -> Block:
    """One layer's weights with its slice of an adapter added."""
    merged = jax.tree.map(lambda w: w, block)
    maps = _linear_maps(block.config)
    for target in adapter.config.targets:
        name, _ = maps[target]
        delta = adapter.config.scale * getattr(adapter, target).product()
        param = jax.tree.map(
            lambda w, delta=delta: (w.astype(jnp.float32) + delta).astype(w.dtype),
            getattr(block, name),
        )
        setattr(merged, name, param)
    return merged


def _linear_maps(config: DecoderConfig) -> dict[str, tuple[str, nnx.Param]]:
    """target to (attribute of `Block`, abstract weight of one layer)."""
    block = jax.eval_shape(lambda: Block(config, jax.random.key(0)))
    by_module = {
        param.get_metadata("hf").removesuffix(".weight").rsplit(".", 1)[-1]: (name, param)
        for name, param in named_weights(block)
        if param.get_metadata("inputs")
    }
    return {target: by_module[target] for target in TARGETS}
