"""Sharded training steps compiled for a real TPU topology, which needs libtpu and no TPU."""

import pytest

PROGRAM = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.sharding import MESH_AXES, batch_sharding, shardings
from jaxconv.perf.chips import describe, topology
from jaxconv.perf.compiling import compile_program
from jaxconv.perf.flops import training_flops
from jaxconv.perf.roofline import estimate, places
from jaxconv.perf.table import Program, to_dict

CONFIG = DecoderConfig(
    family="llama", vocab_size=512, embed_dim=256, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=64, mlp_dim=512, max_positions=64, dtype="bfloat16", remat=REMAT, kernels="xla",
)
ROWS, LENGTH = 16, 32
v5e = topology("v5e:2x4")
devices = np.array(describe(v5e).devices).reshape(4, 1, 2)
mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
model = jax.eval_shape(lambda: Decoder(CONFIG, jax.random.key(0)))
where = shardings(model, mesh)
model = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, where)
tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))

def loss(model, tokens):
    return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens)), axis=-1))

def step(model, tokens):
    value, gradient = jax.value_and_grad(loss)(model, tokens)
    return jax.tree.map(lambda w, g: w - 0.1 * g, model, gradient), value

done = compile_program(
    jax.jit(step, out_shardings=(where, None), donate_argnums=0).lower(model, tokens)
)
flops = training_flops(CONFIG, ROWS, LENGTH)
seconds = estimate(
    done.cost, v5e, places(mesh), tokens=ROWS * LENGTH, model_flops=flops
)
parts = [np.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(model)]
at = CONFIG.flops_per_token
try:
    describe(topology("v5e:3x5"))
except Refused as error:
    refusal = str(error)
print(json.dumps({
    **to_dict([Program("step", done, seconds)], v5e)["programs"]["step"],
    "weights": int(sum(parts)),
    # Of queries that see no later key, and of all against all, which is what runs.
    "model_flops": flops,
    "masked": ROWS * LENGTH * (at(LENGTH) - at((LENGTH + 1) / 2)),
    "attention": ROWS * LENGTH * (at(LENGTH) - at(0)),
    "refusal": refusal,
}))
"""


def compile_step(run, remat: str) -> dict:
    return run(PROGRAM.replace("REMAT", repr(remat)))


@pytest.fixture(scope="module")
def step(run_with_libtpu):
    return compile_step(run_with_libtpu, "none")


def test_flops_are_a_devices_share(step):
    assert step["flops"] == (step["model_flops"] + 3 * step["masked"]) / 8
    assert step["assumptions"] == []


def test_collectives_are_those_of_data_and_tensor_parallelism(step):
    large = [c for c in step["collectives"] if c["bytes"] > 1000]
    assert {c["kind"] for c in large} <= {"all-reduce", "reduce-scatter", "all-gather"}
    # Four copies of the model add up their gradients, which have the size of the weights: in
    # float32, or in bfloat16 where the compiler adds before it widens.
    copies = [c for c in large if c["devices"] == 4 and c["kind"] != "all-gather"]
    added = sum(c["bytes"] * c["times"] for c in copies)
    assert 0.5 * step["weights"] <= added <= 1.1 * step["weights"]
    # Both halves of each attention and MLP are added in every layer, forward and backward.
    halves = [c for c in large if c["devices"] == 2 and "while/body" in c["scope"]]
    activations = 16 // 4 * 32 * 256 * 2
    assert all(c["times"] == 3 for c in halves)
    assert sum(c["bytes"] * c["times"] for c in halves) == 3 * 4 * activations


def test_memory_is_that_of_the_arrays(step):
    memory = step["memory"]
    tokens = 16 // 4 * 32 * 4
    # Small arrays are padded to whole tiles.
    assert 0 <= memory["arguments"] - step["weights"] - tokens < 0.05 * step["weights"]
    assert memory["aliased"] >= step["weights"]
    assert memory["outputs"] - memory["aliased"] < 4096
    assert step["fits"] and 0 < memory["peak"] < 1 << 30


def test_the_estimate_is_within_what_the_chip_can_do(step):
    estimate = step["estimate"]
    assert estimate["compute"] == pytest.approx(step["flops"] / 197e12)
    assert estimate["hbm"] == pytest.approx(step["bytes"] / 819e9)
    assert estimate["ici"] > 0 and estimate["dcn"] == 0
    parts = [estimate[term] for term in ("compute", "hbm", "ici")]
    assert max(parts) <= estimate["seconds"] <= sum(parts)
    assert estimate["tokens_per_second"] == pytest.approx(16 * 32 / estimate["seconds"])
    share = step["model_flops"] / (8 * 197e12 * estimate["seconds"])
    assert 0 < share < 1 and estimate["mfu"] == pytest.approx(share)


def test_a_topology_that_libtpu_does_not_know_is_refused(step):
    assert step["refusal"].startswith("topology is v5e:3x5; libtpu refuses it: ")


@pytest.mark.slow
def test_remat_runs_layers_again(run_with_libtpu, step):
    again = compile_step(run_with_libtpu, "full")
    assert again["flops"] > 1.1 * step["flops"]


TOO_LARGE = """
import dataclasses, json
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxconv.perf.chips import describe, topology
from jaxconv.perf.compiling import compile_program

device = describe(topology("v5e:2x2")).devices[0]

def scores(x, w):
    def layer(x, w):
        with jax.named_scope("wide"):
            return jnp.tanh(x @ w), x
    x, kept = jax.lax.scan(layer, x, w)
    return x, kept[::-1] * 2

shapes = ((65536, 2048), (64, 2048, 2048))
arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=SingleDeviceSharding(device))
          for s in shapes]
done = compile_program(jax.jit(scores).lower(*arrays))
print(json.dumps({**dataclasses.asdict(done), "flops": done.cost.flops}))
"""


def test_what_does_not_fit_still_tells_what_it_would_take(run_with_libtpu):
    done = run_with_libtpu(TOO_LARGE)
    gib = 1 << 30
    assert done["shortage"]["needed"] > 16 * gib > done["shortage"]["available"] > 15 * gib
    assert done["memory"]["arguments"] == (65536 * 2048 + 64 * 2048 * 2048) * 2
    largest = done["buffers"][0]
    assert largest["shape"] == "bf16[64,65536,2048]" and largest["bytes"] == 16 * gib
    assert "while/body" in largest["scope"]
    assert done["flops"] == 64 * 2 * 65536 * 2048 * 2048


KERNELS = """
import json
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding
from jaxconv.models.attention import splash
from jaxconv.models.config import DecoderConfig
from jaxconv.perf.chips import describe, topology
from jaxconv.perf.flops import splash_flops
from jaxconv.perf.hlo import program_cost

CONFIG = DecoderConfig(
    family="llama", vocab_size=512, embed_dim=512, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=128, mlp_dim=512, max_positions=256, dtype="bfloat16", kernels="tpu",
)
one = SingleDeviceSharding(describe(topology("v5e:2x2")).devices[0])

def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)

def square(x_ref, out_ref):
    out_ref[...] = jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

def told(x):
    estimate = pl.CostEstimate(flops=4321, transcendentals=7, bytes_accessed=98765)
    shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    return pl.pallas_call(square, out_shape=shape, cost_estimate=estimate)(x)

def attended(q, k, v):
    return splash(q, k, v, None, CONFIG, None).astype(jnp.float32).sum()

cost = program_cost(jax.jit(told).lower(array(128, 128)).compile())
q, k = array(2, 256, 4, 128), array(2, 256, 2, 128)
program = jax.jit(jax.grad(attended, argnums=(0, 1, 2))).lower(q, k, k).compile()
silent = program_cost(program)
given = program_cost(program, kernels=splash_flops(CONFIG, 2, 256))
print(json.dumps([cost.flops, cost.bytes, cost.assumptions, silent.flops, silent.assumptions,
                  given.flops, given.assumptions]))
"""


@pytest.mark.slow
def test_kernels_count_what_they_or_the_formulas_say(run_with_libtpu):
    flops, bytes, assumed, silent, unknown, given, told = run_with_libtpu(KERNELS)
    assert (flops, bytes, assumed) == (4321, 98765, [])
    assert silent == 0 and len(unknown) == 3 and all("not known" in line for line in unknown)
    product = 2 * 2 * 4 * 128 * 256 * 257 / 2
    assert given == (2 + 3 + 4) * product
    assert len(told) == 3 and all("as given" in line for line in told)


ALL_TOPOLOGIES = """
import json
from jaxconv.perf.chips import describe, topology

names = ["v4:2x2x1", "v5e:1x1", "v5e:4x8", "v5p:4x4x4", "v6e:2x4", "tpu7x:2x2x1", "2xv5e:2x4"]
known = {}
for name in names:
    mine, theirs = topology(name), describe(topology(name)).devices
    known[name] = [mine.devices, len(theirs), len({tuple(d.coords) for d in theirs}) * mine.slices,
                   mine.chips, theirs[0].device_kind, mine.chip.kinds]
print(json.dumps(known))
"""


def test_topologies_are_those_of_libtpu(run_with_libtpu):
    for name, told in run_with_libtpu(ALL_TOPOLOGIES).items():
        devices, theirs, places, chips, kind, kinds = told
        assert devices == theirs, name
        assert places == chips, name
        assert kind in kinds, name
