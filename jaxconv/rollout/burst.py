"""What the slot engine runs on the device: the state of its slots and the programs that change it.

All state is one pytree, `SlotState`. A burst decodes it in place and logs what it sampled; between
bursts slots are given their turns and the cache grows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxconv_kernels import Sampled, sample, sample_sharded
from jaxconv_kernels.sampling.spec import is_small

from jaxconv.models.attention import soft_cap
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import Cache, DecodeWeights, decode_step, empty_cache
from jaxconv.models.sharding import spec_of


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
        hidden_BD, logits_BV, cache = forward(weights, state, config)
        with jax.named_scope("sample"):
            drawn = draw(
                logits_BV,
                token_keys(state),
                temperature,
                top_k.astype(jnp.int32),
                top_p,
                min_p,
                config=config,
            )
        value = critic(weights, hidden_BD)
        log = write(log, step, rows, state.speaking, drawn, value)
        state = went_on(state, cache, drawn.token, stop_ids)
        return step + 1, state, log

    empty = BurstLog.empty(len(rows), burst)
    _, state, log = jax.lax.while_loop(unfinished, decode, (jnp.int32(0), state, empty))
    return state, dataclasses.replace(log, speaking=state.speaking)


def forward(weights: DecodeWeights, state: SlotState, config: DecoderConfig):
    """One token a row through the decoder: (hidden [B, D], logits float32 [B, V], cache)."""
    with jax.named_scope("decode_step"):
        hidden_BD, cache = decode_step(weights, config, state.cache, state.token, state.length)
    with jax.named_scope("head"):
        logits_BV = jnp.dot(hidden_BD, weights.head, preferred_element_type=jnp.float32)
    return hidden_BD, soft_cap(logits_BV, config.final_softcap), cache


def critic(weights: DecodeWeights, hidden_BD: jax.Array) -> jax.Array:
    """The value head on hidden states, float32 [B]."""
    return hidden_BD.astype(jnp.float32) @ weights.value_kernel + weights.value_bias


def token_keys(state: SlotState) -> jax.Array:
    """The keys of the tokens after those that the slots' rows have read, typed [B]."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key), state.length + 1)


def write(
    log: BurstLog,
    step: jax.Array,
    rows_B: jax.Array,
    speaking: jax.Array,
    drawn: Sampled,
    value: jax.Array,
) -> BurstLog:
    """The log with one token more of each row that speaks."""
    # Rows that do not speak write past the end of the log and are dropped.
    at = (rows_B, jnp.where(speaking, log.count, log.token.shape[1]))
    return BurstLog(
        token=log.token.at[at].set(drawn.token, mode="drop"),
        logprob=log.logprob.at[at].set(drawn.logprob_processed, mode="drop"),
        value=log.value.at[at].set(value, mode="drop"),
        count=log.count + speaking,
        speaking=log.speaking,
        steps=step + 1,
    )


def went_on(state: SlotState, cache: Cache, token_B: jax.Array, stop_ids: jax.Array) -> SlotState:
    """The slots after those that speak have said a token each."""
    speaking = state.speaking
    budget = state.budget - speaking
    ended = (token_B[:, None] == stop_ids).any(-1)
    return SlotState(
        cache=cache,
        token=jnp.where(speaking, token_B, state.token),
        length=state.length + speaking,
        budget=budget,
        speaking=speaking & ~ended & (budget > 0),
        key=state.key,
    )


def draw(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    allowed_BW: jax.Array | None = None,
    *,
    config: DecoderConfig,
) -> Sampled:
    """`sample` from logits whose vocabulary may be padded and split over a group of devices.

    The devices then exchange a row's candidates and a few numbers of each of its cells, or in a
    small vocabulary its logits. `allowed_BW` is the packed mask of the vocabulary without padding,
    the same on every device; None allows all of it.
    """
    axis = spec_of(logits_BV)[1]
    if axis is None:
        return sample(
            logits_BV,
            keys_B,
            temperature=temperature_B,
            top_k=top_k_B,
            top_p=top_p_B,
            min_p=min_p_B,
            mask=allowed_BW,
            implementation=config.implementation,
        )
    vocab = config.vocab_size

    def local(logits_BV, keys_B, temperature_B, top_k_B, top_p_B, min_p_B, *allowed):
        filters = {"temperature": temperature_B, "top_p": top_p_B, "min_p": min_p_B}
        if is_small(vocab):
            whole_BV = jax.lax.all_gather(logits_BV, axis, axis=1, tiled=True)[:, :vocab]
            mask = allowed[0] if allowed else None
            return sample(
                whole_BV, keys_B, top_k=top_k_B, mask=mask, implementation="xla", **filters
            )
        piece = logits_BV.shape[1]
        ids = jax.lax.axis_index(axis) * piece + jnp.arange(piece)
        logits_BV = jnp.where(ids < vocab, logits_BV, -jnp.inf)
        top_k_B = jnp.where(top_k_B < vocab, top_k_B, 0)  # as it is off without the padding
        mask = allowed[0] if allowed else None
        return sample_sharded(
            logits_BV, keys_B, axis_name=axis, top_k=top_k_B, mask=mask, **filters
        )

    more, specs = (), (P(None, axis), *(P(),) * 5)
    if allowed_BW is not None and is_small(vocab):
        more, specs = (allowed_BW,), (*specs, P())
    elif allowed_BW is not None:
        # A device has whole cells of the vocabulary, so whole words of its mask.
        words = logits_BV.shape[1] // 32 - allowed_BW.shape[1]
        padded_BW = jnp.pad(allowed_BW, ((0, 0), (0, words)))
        more, specs = (jax.sharding.reshard(padded_BW, P(None, axis)),), (*specs, P(None, axis))
    return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(
        logits_BV, keys_B, temperature_B, top_k_B, top_p_B, min_p_B, *more
    )


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
