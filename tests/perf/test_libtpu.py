"""How libtpu gathers the weights of a split model, with the options that runs give it."""

import os
import subprocess
import sys

import pytest

GATHERED = """
import json
from jaxconv.perf import libtpu
libtpu.tell()
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxconv.models.sharding import device_mesh, project
from jaxconv.perf.chips import describe, topology
from jaxconv.perf.hlo import program_cost

def loss(weights_LDD, x_BTD):
    layers = jax.lax.scan(lambda x, w: (x + jnp.tanh(project(x, w)), None), x_BTD, weights_LDD)
    return (layers[0].astype(jnp.float32) ** 2).sum()

told = {}
for name in ("v5p:4x4x4", "v6e:4x4", "v5e:4x8"):
    devices = describe(topology(name)).devices
    mesh = device_mesh(fsdp=len(devices), devices=devices)
    def array(spec, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss)).lower(
            array(P(None, "fsdp"), jnp.float32, 6, 4096, 4096),
            array(P("fsdp"), jnp.bfloat16, len(devices), 2048, 4096),
        )
    told[name] = [[c.kind, c.bytes] for c in program_cost(lowered.compile()).collectives]
print(json.dumps(told))
"""


@pytest.mark.slow
def test_weights_are_gathered_and_gradients_alone_added_up(run_with_libtpu):
    for name, collectives in run_with_libtpu(GATHERED).items():
        large = [kind for kind, bytes in collectives if bytes >= 4096 * 4096 * 2]
        assert "all-gather" in large, (name, large)
        # Without the options v5p gathers by adding zeros.
        assert sum(kind != "all-gather" for kind in large) <= 1, (name, large)


def options(**environment: str) -> str:
    program = "import os; from jaxconv.perf import libtpu; print(libtpu.tell() or 'none')"
    held = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"} | environment
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=held, capture_output=True, text=True, check=True).stdout


def test_options_of_the_user_s_own_stay():
    assert "--xla_enable_async_all_gather=true" in options()
    assert options(LIBTPU_INIT_ARGS="--xla_tpu_mine=1") == "--xla_tpu_mine=1\n"
    assert options(LIBTPU_INIT_ARGS="") == "none\n"
