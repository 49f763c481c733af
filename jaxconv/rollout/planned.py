"""The programs of self-play and of sampled replies before there is a model, and what the run holds
beside each of them.

Through the whole of self-play a device has its parts of the training state, of the frozen
reference, and of the weights and caches of the engines that it serves. In the arena three policies
have engines: the trained model, the frozen one, and that one at another temperature, which shares
the weights of the second.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import DeviceGroup, device_groups, refuse_uneven
from jaxconv.models.handover import abstract_weights
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.sharding import TENSOR
from jaxconv.perf.chips import alone
from jaxconv.perf.flops import decode_flops, prefill_flops, splash_flops, training_flops
from jaxconv.perf.memory import size, suggestion
from jaxconv.perf.planned import Planned, bytes_on_a_device
from jaxconv.rollout import programs
from jaxconv.rollout.replies import reply_shape
from jaxconv.rollout.shape import EngineShape
from jaxconv.rollout.world import engine_shape
from jaxconv.train.mesh import parts, placed, refuse_idle
from jaxconv.train.ppo import PPO
from jaxconv.train.starting_point import architecture
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import lora_config, split

_ARENA_MODELS, _ARENA_POLICIES = 2, 3


def planned_self_play(
    config, devices: Sequence[jax.Device], ppo: PPO, optimizer: optax.GradientTransformation
) -> list[Planned]:
    """The PPO update, and an engine's prefill and decode burst, in self-play and in the arena.

    Args:
        config: of the run.
        devices: of all processes.
        ppo, optimizer: of the run, on these devices.
    """
    refuse_idle(ppo.mesh, devices, "minibatching.rows", ppo.sizes.rows)
    decoder = architecture(config, config.rollout.lengths[-1])
    lora = lora_config(config)

    def start(key):
        model = ActorCritic(Decoder(decoder, key), ValueHead(decoder.embed_dim))
        return model, *split(model, lora, key)

    frozen, trained, resting = jax.eval_shape(start, jax.random.key(config.seed))
    state = TrainState.shapes(trained, optimizer, ppo.mesh)
    frozen, resting = placed((frozen, resting), ppo.mesh)
    # Of an adapter the base is the reference, and an argument of the update.
    reference = {} if lora else {"reference": bytes_on_a_device(frozen)}
    weights, caches = _held_by_engines(config, decoder, devices)
    engines = {"rollout weights": weights, "caches": caches}
    update = _update(config, decoder, ppo, state, resting, reference | engines)

    others = caches - _cache(config, decoder, devices)  # of the engines that share the devices
    training = {"training state": bytes_on_a_device((state, resting)), **reference}
    arena = {
        "models": _ARENA_MODELS * bytes_on_a_device(frozen),
        "rollout weights": (_ARENA_MODELS - 1) * weights,
        "caches": (_ARENA_POLICIES - 1) * caches + others,
    }
    rollout = _engine_programs(config, decoder, devices, training | {"caches": others})
    in_arena = [
        Planned(**{**vars(p), "name": f"{p.name} (arena)", "beside": arena}) for p in rollout[-1:]
    ]
    return [update, *rollout, *in_arena]


def _update(
    config,
    decoder: DecoderConfig,
    ppo: PPO,
    state: TrainState,
    resting: Decoder | None,
    beside: dict[str, int],
) -> Planned:
    sizes, mesh = ppo.sizes, ppo.mesh
    microbatches = _microbatches(config)
    rows = microbatches * sizes.rows
    padded = math.ceil(microbatches / sizes.capacity) * sizes.capacity
    flops = training_flops(decoder, rows, sizes.width, trains_weights=resting is None)
    here = sizes.rows // parts(mesh)
    return Planned(
        "train step",
        lambda: ppo.lower(state, resting, padded),
        mesh,
        tokens=rows * sizes.width,
        model_flops=flops,
        relief=functools.partial(suggestion, remat=decoder.remat, microbatch=here),
        trips={"": microbatches},
        kernels=splash_flops(decoder, sizes.rows / mesh.size, sizes.width),
        beside=beside,
        arguments=bytes_on_a_device((state, resting)),
    )


def _microbatches(config) -> int:
    """Of a minibatch in which every stream is as long as its cache."""
    s, m = config.self_play, config.minibatching
    streams = math.ceil(s.games * max(config.env.players) / m.minibatches)
    return math.ceil(streams / (m.width // config.rollout.lengths[-1]) / m.rows)


def _engine_programs(
    config, decoder: DecoderConfig, devices: Sequence[jax.Device], beside: dict[str, int]
) -> list[Planned]:
    """Prefill and decode burst of self-play."""
    shape, tensor = engine_shape(config), config.rollout.tensor
    wider = tensor < len(_of_a_process(devices)[0])

    def relief(resident: int, available: int) -> str:
        if wider:
            return _wider("rollout.tensor", tensor)
        return (
            f"use fewer config.rollout.slots={shape.slots}, or a larger mesh: {size(resident)} of "
            f"{size(available)} stay on a device"
        )

    refuse_uneven(decoder, tensor)
    return _programs_of_one(decoder, shape, _groups(config, devices), relief, beside)


def planned_replies(
    config, decoder: DecoderConfig, devices: Sequence[jax.Device], training: Mesh
) -> list[Planned]:
    """Prefill and decode burst of `replies` before and after fine-tuning, beside the model that is
    trained on the mesh `training`."""
    tensor, length = config.samples.tensor, config.batch.width
    refuse_uneven(decoder, tensor, "samples.tensor")
    local = _of_a_process(devices)
    groups = [g for own in local for g in device_groups(tensor, own, "samples.tensor")]
    model = jax.eval_shape(lambda: Decoder(decoder, jax.random.key(0)))

    def relief(resident: int, available: int) -> str:
        if tensor < len(local[0]):
            return _wider("samples.tensor", tensor)
        return (
            f"use a smaller config.batch.width={length}, or a larger mesh: {size(resident)} of "
            f"{size(available)} stay on a device"
        )

    shape = reply_shape(config.samples.prompts, length)
    beside = {"model": bytes_on_a_device(placed(model, training))}
    planned = _programs_of_one(decoder, shape, groups, relief, beside)
    return [Planned(**{**vars(p), "name": f"{p.name} (samples)"}) for p in planned]


def _wider(field: str, tensor: int) -> str:
    return (
        f"use a larger config.{field}={tensor}: engines on more devices each have less of the "
        "weights and caches"
    )


def _programs_of_one(
    decoder: DecoderConfig,
    shape: EngineShape,
    groups: Sequence[DeviceGroup],
    relief: Callable[[int, int], str],
    beside: dict[str, int],
) -> list[Planned]:
    """Prefill and decode burst of one engine, on the first of the groups that run them."""
    group = DeviceGroup(tuple(alone(groups[0].devices)))
    mesh = group.mesh or Mesh([group.devices[0]], (TENSOR,))
    rows, tokens, length = shape.prefill_rows[-1], shape.prefill_tokens[-1], shape.lengths[-1]

    @functools.cache
    def lowered() -> dict[str, Any]:
        return programs.lower(decoder, shape, group)

    return [
        Planned(
            "prefill",
            lambda: lowered()["prefill"],
            mesh,
            tokens=rows * tokens * len(groups),
            model_flops=prefill_flops(decoder, rows, tokens, length - tokens),
            relief=relief,
            beside=beside,
        ),
        Planned(
            "decode burst",
            lambda: lowered()["decode_burst"],
            mesh,
            tokens=shape.slots * shape.burst * len(groups),
            model_flops=decode_flops(decoder, shape.slots, length) * shape.burst,
            relief=relief,
            # Inside a step only the sampler loops, for filters that self-play leaves off.
            trips={"/sample/": 1, "": shape.burst},
            beside=beside,
        ),
    ]


def _groups(config, devices: Sequence[jax.Device]) -> list[DeviceGroup]:
    """The groups of devices that have engines, of all processes."""
    used = math.ceil(config.rollout.engines / 2)  # two neighbours share a group
    return [
        group
        for local in _of_a_process(devices)
        for group in device_groups(config.rollout.tensor, local)[:used]
    ]


def _of_a_process(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    return list(by_process.values())


def _held_by_engines(
    config, decoder: DecoderConfig, devices: Sequence[jax.Device]
) -> tuple[int, int]:
    """Bytes on a device of one policy's engines: (weights, caches at their longest)."""
    group = _groups(config, devices)[0]
    groups = len(device_groups(config.rollout.tensor, _of_a_process(devices)[0]))
    # Neighbours sit in pairs, from the first group on.
    pairs = math.ceil(math.ceil(config.rollout.engines / 2) / groups)
    engines = min(2 * pairs, config.rollout.engines)
    weights = bytes_on_a_device(abstract_weights(decoder, group))
    return weights, engines * _cache(config, decoder, devices)


def _cache(config, decoder: DecoderConfig, devices: Sequence[jax.Device]) -> int:
    shape, group = engine_shape(config), _groups(config, devices)[0]
    state = programs.abstract_state(decoder, shape.slots, shape.lengths[-1], group)
    return bytes_on_a_device(state)
