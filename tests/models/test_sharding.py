"""Weights on a mesh of eight fake devices: the same model, split as the table says."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.sharding import device_mesh, partition_spec
from jaxconv.models.weights import named_weights

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=40,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_positions=32,
)

PROGRAM = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from jaxconv.models.hf import load_pretrained, save_pretrained
from jaxconv.models.sharding import device_mesh
from tests_config import CONFIG
from jaxconv.models.decoder import Decoder

folder = sys.argv[1]
mesh = device_mesh(data=2, fsdp=2, tensor=2)
model = jax.jit(lambda: Decoder(CONFIG, jax.random.key(0)))()
save_pretrained(model, None, folder)
split, _ = load_pretrained(folder, mesh=mesh)
whole, _ = load_pretrained(folder)

# Really split: an eighth, a quarter or a half of the bytes on each device.
gate = split.layers.gate[...]
assert gate.shape == (2, 16, 24) and gate.addressable_shards[0].data.shape == (2, 8, 12)
assert split.embed[...].addressable_shards[0].data.shape == (20, 8)
assert split.layers.k[...].addressable_shards[0].data.shape == (2, 8, 1, 8)
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
    np.testing.assert_array_equal(a, b)

# Export gathers: the same bytes.
save_pretrained(split, None, folder + "-split")
a, b = (open(f + "/model.safetensors", "rb").read() for f in (folder, folder + "-split"))
assert a == b
print("same")
"""


@pytest.fixture(scope="module")
def abstract():
    return jax.eval_shape(lambda: Decoder(CONFIG, jax.random.key(0)))


def test_split_model_equals_whole_model(tmp_path):
    program = PROGRAM.replace(
        "from tests_config import CONFIG",
        f"from jaxconv.models.config import DecoderConfig\nCONFIG = {CONFIG!r}",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("same")


def fake_mesh(**shape):
    return SimpleNamespace(shape=shape)


def test_specs_follow_the_logical_axes(abstract):
    specs = {
        name: partition_spec(param, fake_mesh(data=2, fsdp=4, tensor=2))
        for name, param in named_weights(abstract)
    }
    assert specs["embed"] == PartitionSpec("tensor", "fsdp")
    assert specs["lm_head"] == PartitionSpec("fsdp", "tensor")
    assert specs["layers.q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["layers.o"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["layers.down"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["final_norm"] == PartitionSpec(None)  # not worth gathering


def test_an_axis_that_does_not_divide_is_refused_by_name(abstract):
    k = dict(named_weights(abstract))["layers.k"]
    with pytest.raises(Refused, match=r"k_proj.weight: kv_heads is 2; mesh axis tensor has 4"):
        partition_spec(k, fake_mesh(data=1, fsdp=1, tensor=4))


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(Refused, match=r"needs 4096 devices; there are"):
        device_mesh(data=4096)
