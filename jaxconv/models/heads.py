"""Heads on a decoder's hidden states: the critic's value head."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxconv.models.decoder import Decoder
from jaxconv.models.weights import weight, zeros


class ValueHead(nnx.Module):
    """A linear map from hidden state to one float32 value.

    It starts at `bias` everywhere. A zero kernel keeps the first critic updates from sending noise
    through a shared trunk; setting `bias` to the mean return removes the largest one.

    Args:
        embed_dim: width D of the hidden states.
        bias: first value of every state.
    """

    def __init__(self, embed_dim: int, bias: float = 0.0):
        key = jax.random.key(0)  # the initial values are constants
        self.kernel = weight(
            key, (embed_dim, 1), axes=("embed", None), hf="value_head.weight", init=zeros, inputs=1
        )
        self.bias = weight(
            key,
            (1,),
            axes=(None,),
            hf="value_head.bias",
            init=lambda _, shape: jnp.full(shape, bias, jnp.float32),
        )

    @jax.named_scope("value_head")
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """float32 values [...] of hidden states [..., D]."""
        return (hidden.astype(jnp.float32) @ self.kernel[...] + self.bias[...])[..., 0]


class ActorCritic(nnx.Module):
    """A policy and its critic on one trunk: `decoder` gives hidden states, `value_head` values."""

    def __init__(self, decoder: Decoder, value_head: ValueHead):
        self.decoder = decoder
        self.value_head = value_head
