"""What the slot engine runs on the device: the state of its slots and the programs that change it.

All state is one pytree, `SlotState`. A burst decodes it in place and logs what it sampled; between
bursts slots are given their turns and the cache grows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxconv_kernels import sample

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import Cache, DecodeWeights, decode_step, empty_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What the device knows of the slots, [B] each.

    Attributes:
        cache: keys and values of positions [0, length).
        token: int32, the token at position `length`, not yet in the cache.
        length: int32.
        budget: int32, tokens that the turn may still sample.
        speaking: bool.
        key: uint32 [B, 2], key data of each slot's stream.
    """

    cache: Cache
    token: jax.Array
    length: jax.Array
    budget: jax.Array
    speaking: jax.Array
    key: jax.Array

    @classmethod
    def silent(cls, config: DecoderConfig, slots: int, length: int) -> "SlotState":
        """Slots whose streams have not begun, with room for `length` positions."""
        return cls(
            cache=empty_cache(config, slots, length),
            token=jnp.zeros(slots, jnp.int32),
            length=jnp.zeros(slots, jnp.int32),
            budget=jnp.zeros(slots, jnp.int32),
            speaking=jnp.zeros(slots, bool),
            key=jnp.zeros((slots, 2), jnp.uint32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BurstLog:
    """What one burst sampled.

    Attributes:
        token: int32 [B, burst]; the first `count` of each row are real, as below.
        logprob: float32 [B, burst].
        value: float32 [B, burst].
        count: int32 [B].
        speaking: bool [B], whose turn goes on.
        steps: int32, decode steps taken.
    """

    token: jax.Array
    logprob: jax.Array
    value: jax.Array
    count: jax.Array
    speaking: jax.Array
    steps: jax.Array

    @classmethod
    def empty(cls, slots: int, burst: int) -> "BurstLog":
        """The log of no step."""
        return cls(
            token=jnp.zeros((slots, burst), jnp.int32),
            logprob=jnp.zeros((slots, burst), jnp.float32),
            value=jnp.zeros((slots, burst), jnp.float32),
            count=jnp.zeros(slots, jnp.int32),
            speaking=jnp.zeros(slots, bool),
            steps=jnp.int32(0),
        )


@functools.partial(jax.jit, static_argnames=("config", "burst"), donate_argnames=("state",))
def decode_burst(
    weights: DecodeWeights,
    state: SlotState,
    sampling_4: jax.Array,
    stop_ids: jax.Array,
    leave: jax.Array,
    *,
    config: DecoderConfig,
    burst: int,
) -> tuple[SlotState, BurstLog]:
    """Decodes up to `burst` tokens for every slot that speaks; `state` is donated.

    Args:
        weights: of the policy.
        state: slots [B].
        sampling_4: float32: temperature, top_k, top_p, min_p.
        stop_ids: int32 [any], tokens that end a turn.
        leave: float32, share of the slots speaking now after whose end the burst leaves early.
        config: the decoder's architecture.
        burst: most tokens of a slot.
    """
    rows = jnp.arange(state.token.shape[0])
    temperature, top_k, top_p, min_p = (jnp.full(rows.shape, s) for s in sampling_4)
    stay = state.speaking.sum() * (1.0 - leave)

    def unfinished(carry):
        step, state, _ = carry
        speaking = state.speaking.sum()
        return (step < burst) & (speaking > 0) & ((step == 0) | (speaking > stay))

    def decode(carry):
        step, state, log = carry
        with jax.named_scope("decode_step"):
            hidden_BD, cache = decode_step(weights, config, state.cache, state.token, state.length)
        logits_BV = jnp.dot(hidden_BD, weights.head, preferred_element_type=jnp.float32)
        position = state.length + 1
        with jax.named_scope("sample"):
            keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key), position)
            drawn = sample(
                logits_BV,
                keys,
                temperature=temperature,
                top_k=top_k.astype(jnp.int32),
                top_p=top_p,
                min_p=min_p,
            )
        value = hidden_BD.astype(jnp.float32) @ weights.value_kernel + weights.value_bias
        speaking = state.speaking
        # Rows that do not speak write past the end of the log and are dropped.
        at = (rows, jnp.where(speaking, log.count, burst))
        log = BurstLog(
            token=log.token.at[at].set(drawn.token, mode="drop"),
            logprob=log.logprob.at[at].set(drawn.logprob_processed, mode="drop"),
            value=log.value.at[at].set(value, mode="drop"),
            count=log.count + speaking,
            speaking=log.speaking,
            steps=step + 1,
        )
        budget = state.budget - speaking
        ended = (drawn.token[:, None] == stop_ids).any(-1)
        state = SlotState(
            cache=cache,
            token=jnp.where(speaking, drawn.token, state.token),
            length=state.length + speaking,
            budget=budget,
            speaking=speaking & ~ended & (budget > 0),
            key=state.key,
        )
        return step + 1, state, log

    empty = BurstLog.empty(len(rows), burst)
    _, state, log = jax.lax.while_loop(unfinished, decode, (jnp.int32(0), state, empty))
    return state, dataclasses.replace(log, speaking=state.speaking)


@functools.partial(jax.jit, donate_argnames=("state",))
def give_turns(
    state: SlotState,
    run_key: jax.Array,
    rows_N: jax.Array,
    stream_N: jax.Array,
    token_N: jax.Array,
    length_N: jax.Array,
    budget_N: jax.Array,
) -> SlotState:
    """Gives rows their next input token and lets them speak; rows outside the state are padding.

    All arrays are integers [N], one entry a slot; `state` is donated.
    """
    keys = jax.vmap(lambda stream: jax.random.key_data(jax.random.fold_in(run_key, stream)))

    def put(old, new):
        return old.at[rows_N].set(new, mode="drop")

    return SlotState(
        cache=state.cache,
        token=put(state.token, token_N),
        length=put(state.length, length_N),
        budget=put(state.budget, budget_N),
        speaking=put(state.speaking, True),
        key=put(state.key, keys(stream_N)),
    )


@functools.partial(jax.jit, static_argnames=("length",))
def grow(cache: Cache, *, length: int) -> Cache:
    """The same cache with room for `length` positions."""
    return jax.tree.map(
        lambda c: jnp.pad(c, ((0, 0), (0, 0), (0, length - c.shape[2]), (0, 0))), cache
    )
