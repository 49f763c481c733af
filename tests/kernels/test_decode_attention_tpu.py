"""The TPU kernel of decode attention, compiled for TPUs: room, layouts, temporaries, cycles."""

import json
import math

import pytest

PROGRAM = """
import functools
import jax
from jaxconv_kernels.decode_attention import decode_attention

cases = {}
for name, (rows, heads, kv_heads, keys, width, dtype, window, softcap) in models.items():
    call = functools.partial(
        decode_attention, scale=0.1, window=window, softcap=softcap, implementation="tpu"
    )
    own, cache = ((rows, kv_heads, width), dtype), ((rows, kv_heads, keys, width), dtype)
    shapes = [((rows, heads, width), dtype), own, own, cache, cache, ((rows,), "int32")]
    cases[name] = jax.jit(call, donate_argnums=(3, 4)), shapes
"""

# Rows, query heads, key heads, keys, width of a head, dtype, window, soft cap.
MODELS = {
    "half a vector wide": (64, 14, 2, 2048, 64, "bfloat16", None, None),
    "half a vector wide, float32": (64, 14, 2, 2048, 64, "float32", None, None),
    "odd group": (4, 9, 3, 2048, 64, "bfloat16", None, None),
    "odd width, short of a block": (3, 16, 16, 1000, 80, "bfloat16", None, None),
    "tiny": (2, 4, 2, 40, 16, "float32", None, None),
    "window, float32": (4, 2, 1, 384, 32, "float32", 100, None),
    "window and cap": (8, 8, 4, 8192, 256, "bfloat16", 4096, 50.0),
    "long": (32, 28, 4, 32_768, 128, "bfloat16", None, None),
    "longest": (1, 64, 8, 131_072, 128, "bfloat16", None, None),
    "a key head a query head": (16, 64, 64, 4096, 128, "bfloat16", None, None),
}
LANES = 128


def program(*names):
    return f"models = { {name: MODELS[name] for name in names}!r}\n{PROGRAM}"


@pytest.mark.slow
def test_compiles_for_tpus_and_copies_no_cache_of_whole_vectors(compile_cases_for_tpu):
    for name, by_chip in compile_cases_for_tpu(program(*MODELS)).items():
        rows, _, kv_heads, keys, width, dtype, *_ = MODELS[name]
        lanes = math.ceil(width / LANES) * LANES
        cache = 2 * rows * kv_heads * keys * lanes * (2 if dtype == "bfloat16" else 4)
        for chip, compiled in by_chip.items():
            assert compiled["kernels"] == 1, (name, chip)
            # Narrow heads, which an argument packs, are laid out in lanes once.
            allowed = (1 << 20) + (0 if width == lanes else 1.1 * cache)
            assert compiled["temporary_bytes"] <= allowed, (name, chip)


@pytest.mark.slow
def test_a_block_of_keys_costs_fewer_cycles_than_its_copy(loops_on_v6e):
    """On a v6e, of 1.64 TB/s; the clock of 1.75 GHz is an estimate."""
    budgets = {"half a vector wide": 926, "long": 1355}
    for name, (grid,) in zip(
        budgets, loops_on_v6e(program(*budgets), "decode_attention"), strict=True
    ):
        _, _, kv_heads, _, width, *_ = MODELS[name]
        copied = 2 * 1024 * kv_heads * max(width, LANES) * 2
        assert grid.bundles <= copied / 1.64e12 * 1.75e9, name
        assert grid.bundles <= 1.15 * budgets[name], name


BURST = r"""
import collections, json, math, re
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import prefill, unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.rollout.burst import SlotState, decode_burst

jit_prefill = jax.jit(prefill, static_argnames="config", donate_argnames="cache")

def compiled(program, device, dtype):
    config = DecoderConfig(
        family="llama", vocab_size=8192, embed_dim=256, num_layers=2, num_heads=14, num_kv_heads=2,
        head_dim=128, mlp_dim=256, max_positions=1024, dtype=dtype, kernels="tpu",
    )
    model = ActorCritic(Decoder(config, jax.random.key(0)), ValueHead(config.embed_dim, 1.0))
    state = jax.eval_shape(lambda: SlotState.silent(config, 64, 1024))
    def on_device(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    weights, state = jax.tree.map(on_device, (unstack(model), state))
    if program == "prefill":
        pieces = jax.tree.map(on_device, [jnp.zeros(s, jnp.int32) for s in ((16, 64), 16, 16, 16)])
        return jit_prefill.lower(weights, config, state.cache, *pieces).compile()
    rest = jax.tree.map(on_device, (jnp.ones(4), jnp.zeros(1, jnp.int32), jnp.float32(0.5)))
    return decode_burst.lower(weights, state, *rest, config=config, burst=4).compile()

found = []
for topology in ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"):
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    for program, dtype in (("burst", "float32"), ("burst", "bfloat16"), ("prefill", "bfloat16")):
        done = compiled(program, device, dtype)
        results = re.findall(r" = \w+\[([\d,]+)\]\S* ([\w-]+)\(", done.as_text())
        made = collections.Counter(
            operation for shape, operation in results
            if math.prod(map(int, shape.split(","))) >= 64 * 2 * 1024 * 128
        )
        memory = done.memory_analysis()
        sizes = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        found.append((topology, program, dtype, made, *sizes))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_decoding_on_a_tpu_makes_nothing_of_a_caches_size(run_with_libtpu):
    """Caches are written in place: none is copied, laid out anew or moved to VMEM and back."""
    found = json.loads(run_with_libtpu(BURST).splitlines()[-1])
    assert len(found) == 9
    for chip, program, dtype, made, temporary, aliased in found:
        caches = 4 * 64 * 2 * 1024 * 128 * (2 if dtype == "bfloat16" else 4)
        written = {"fusion", "scatter", "bitcast"} if program == "prefill" else set()
        assert set(made) <= {"parameter", "get-tuple-element"} | written, (chip, program, dtype)
        assert temporary < 8 << 20, (chip, program, dtype)
        assert aliased >= caches, (chip, program, dtype)
