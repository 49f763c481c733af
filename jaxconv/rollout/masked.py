"""A decode step in two halves, for tokens that the host allows or forbids one by one.

A grammar knows what may come next only when it has seen the last token. So a step reads first, for
which nothing has to be known, and draws then: while the device reads, the host finds the masks.
Prefixes that several streams share are here as well: their keys and values, taken from one slot and
put into others.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import Cache, DecodeWeights
from jaxconv.models.sharding import on_each_device
from jaxconv.rollout.burst import (
    BurstLog,
    SlotState,
    critic,
    draw,
    forward,
    token_keys,
    went_on,
    write,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """What the slots are about to draw from.

    Attributes:
        logits: float32 [B, V].
        value: float32 [B].
    """

    logits: jax.Array
    value: jax.Array


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def read(
    weights: DecodeWeights, state: SlotState, *, config: DecoderConfig
) -> tuple[SlotState, Read]:
    """Puts the next input token of every slot into the cache; `state` is donated."""
    hidden_BD, logits_BV, cache = forward(weights, state, config)
    return dataclasses.replace(state, cache=cache), Read(logits_BV, critic(weights, hidden_BD))


@functools.partial(jax.jit, static_argnames=("config",))
def draw_allowed(
    state: SlotState,
    found: Read,
    allowed_BW: jax.Array,
    speaking_B: jax.Array,
    sampling_B4: jax.Array,
    stop_ids: jax.Array,
    *,
    config: DecoderConfig,
) -> tuple[SlotState, BurstLog]:
    """Draws one token for every slot that speaks.

    Args:
        state: slots [B], with `()` as their cache, which stays where it is.
        found: what `read` found.
        allowed_BW: uint32 [B, ceil(V / 32)], packed; a row that allows nothing gives token 0.
        speaking_B: bool, who does.
        sampling_B4: float32: temperature, top_k, top_p, min_p of each slot.
        stop_ids: int32 [any], tokens that end a turn.
        config: the decoder's architecture.

    Returns:
        The slots, as given without a cache, and a log of one step.
    """
    state = dataclasses.replace(state, speaking=speaking_B)
    temperature, top_k, top_p, min_p = sampling_B4.T
    with jax.named_scope("sample"):
        drawn = draw(
            found.logits,
            token_keys(state),
            temperature,
            top_k.astype(jnp.int32),
            top_p,
            min_p,
            allowed_BW,
            config=config,
        )
    slots = len(speaking_B)
    log = BurstLog.empty(slots, 1)
    log = write(log, jnp.int32(0), jnp.arange(slots), speaking_B, drawn, found.value)
    state = went_on(state, state.cache, drawn.token, stop_ids)
    return state, dataclasses.replace(log, speaking=state.speaking)


@functools.partial(jax.jit, static_argnames=("length",))
def take_prefix(cache: Cache, row: jax.Array, *, length: int) -> Cache:
    """Copies of the first `length` positions of a row, [K, length, h] each."""
    return jax.tree.map(
        lambda c: jax.lax.dynamic_index_in_dim(c, row, keepdims=False)[:, :length], cache
    )


@functools.partial(jax.jit, donate_argnames=("cache",))
def put_prefix(cache: Cache, prefix: Cache, rows_N: jax.Array) -> Cache:
    """The cache, which is donated, with the prefix at the beginning of rows; those outside of it
    are padding."""

    def put(c_BKSh, p_KPh, rows_N):
        # With a slice over the heads a TPU would keep the cache in another layout.
        heads_K, at_P = jnp.arange(c_BKSh.shape[1]), jnp.arange(p_KPh.shape[1])
        at = (rows_N[:, None, None], heads_K[:, None], at_P)
        return c_BKSh.at[at].set(p_KPh, mode="drop")

    return jax.tree.map(lambda c, p: on_each_device(put, c, p, rows_N), cache, prefix)
