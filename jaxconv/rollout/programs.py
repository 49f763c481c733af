"""The programs of an engine and where their arrays lie, real or only described.

What is described can be compiled for devices that are not there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import prefill
from jaxconv.models.device_group import DeviceGroup
from jaxconv.models.handover import abstract_weights
from jaxconv.models.sharding import TENSOR
from jaxconv.rollout.burst import BurstLog, SlotState, decode_burst
from jaxconv.rollout.shape import EngineShape

write_prefill = jax.jit(prefill, static_argnames=("config",), donate_argnames=("cache",))
"""`prefill` into a donated cache."""


def state_shardings(config: DecoderConfig, group: DeviceGroup) -> SlotState:
    """Where the state of slots lies: caches split over their heads, the rest on every device."""
    kv, whole = group.sharding(P(None, TENSOR)), group.sharding()
    return SlotState(((kv, kv),) * config.num_layers, *(whole,) * 5)


@functools.cache
def make_silent(config: DecoderConfig, slots: int, length: int, group: DeviceGroup):
    """One program that makes fresh slots: several times as quick as array by array."""
    return jax.jit(
        lambda: SlotState.silent(config, slots, length),
        out_shardings=state_shardings(config, group),
    )


def abstract_state(config: DecoderConfig, slots: int, length: int, group: DeviceGroup) -> SlotState:
    """Shapes, dtypes and shardings of slots with room for `length` positions."""
    state = jax.eval_shape(lambda: SlotState.silent(config, slots, length))
    return jax.tree.map(_placed, state, state_shardings(config, group))


def abstract_log(shape: EngineShape, group: DeviceGroup) -> BurstLog:
    """Shapes, dtypes and shardings of what a burst sampled."""
    log = jax.eval_shape(lambda: BurstLog.empty(shape.slots, shape.burst))
    return jax.tree.map(lambda x: _placed(x, group.sharding()), log)


def _placed(x: jax.ShapeDtypeStruct, where: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def lower(
    config: DecoderConfig, shape: EngineShape, group: DeviceGroup, *, stop_ids: int = 1
) -> dict[str, jax.stages.Lowered]:
    """An engine's largest "prefill" and "decode_burst", lowered for devices that need not exist.

    Args:
        config: the decoder's architecture; its `kernels` name the platform's.
        shape: compiled sizes. The last of each is what is lowered.
        group: devices that the engine spans, such as those of a topology.
        stop_ids: how many tokens end a turn.
    """
    weights = abstract_weights(config, group)
    state = abstract_state(config, shape.slots, shape.lengths[-1], group)
    rows, tokens = shape.prefill_rows[-1], shape.prefill_tokens[-1]

    def array(dtype, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=group.sharding())

    pieces = (array(jnp.int32, rows, tokens), *(array(jnp.int32, rows),) * 3)
    rest = array(jnp.float32, 4), array(jnp.int32, stop_ids), array(jnp.float32)
    with group.tracing():
        return {
            "prefill": write_prefill.lower(weights, config, state.cache, *pieces),
            "decode_burst": decode_burst.lower(
                weights, state, *rest, config=config, burst=shape.burst
            ),
        }
