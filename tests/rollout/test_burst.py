"""What a burst of decoding is made of where the platform has kernels, seen without one."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.rollout.burst import SlotState, decode_burst
from jaxconv.rollout.masked import draw_allowed, read

CHIPS = {
    "tpu": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
}
LAYERS, SLOTS = 2, 8


def lowered(platform: str, kernels: str, *, masked: bool = False) -> str:
    """StableHLO of a burst, or of a masked step, of a model with a vocabulary of 8192."""
    config = DecoderConfig(
        family="llama",
        vocab_size=8192,
        embed_dim=128,
        num_layers=LAYERS,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        mlp_dim=128,
        max_positions=128,
        dtype="bfloat16",
        kernels=kernels,
    )

    def burst(weights, state, sampling_4):
        stop_ids, leave = jnp.zeros(1, jnp.int32), jnp.float32(0.5)
        return decode_burst(weights, state, sampling_4, stop_ids, leave, config=config, burst=4)

    def step(weights, state, sampling_4):
        state, found = read(weights, state, config=config)
        allowed_BW, speaking_B = jnp.zeros((SLOTS, 256), jnp.uint32), jnp.ones(SLOTS, bool)
        sampling_B4 = jnp.broadcast_to(sampling_4, (SLOTS, 4))
        stop_ids = jnp.zeros(1, jnp.int32)
        given = allowed_BW, speaking_B, sampling_B4, stop_ids
        return draw_allowed(state, found, *given, config=config)

    actor_critic = ActorCritic(Decoder(config, jax.random.key(0)), ValueHead(config.embed_dim, 1.0))
    shapes = jax.eval_shape(
        lambda *arrays: arrays,
        unstack(actor_critic),
        SlotState.silent(config, SLOTS, 128),
        jnp.zeros(4),
    )
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    mesh = AbstractMesh((), (), abstract_device=CHIPS[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(
            jax.jit(step if masked else burst), platforms=[platform], disabled_checks=unchecked
        )(*shapes)
    return exported.mlir_module()


@pytest.mark.parametrize("masked", [False, True], ids=["burst", "masked step"])
@pytest.mark.parametrize(
    "platform, kernels, target, expected",
    [
        # Attention of each layer, which writes into the cache on a TPU, and the sampler, which on a
        # GPU reads, takes exact passes and draws in three kernels.
        ("tpu", "tpu", "tpu_custom_call", LAYERS + 1),
        ("cuda", "gpu", "mosaic_gpu_v2", LAYERS + 3),
        ("tpu", "xla", "tpu_custom_call", 0),
        ("cuda", "xla", "mosaic_gpu_v2", 0),
    ],
)
def test_a_burst_attends_and_samples_in_the_kernels_of_the_config(
    platform, kernels, target, expected, masked
):
    text = lowered(platform, kernels, masked=masked)
    assert len(re.findall(rf"custom_call @{target}\b", text)) == expected
