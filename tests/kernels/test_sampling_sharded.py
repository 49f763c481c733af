"""`sample_sharded` on four devices: what `sample` gives on one, bit for bit."""

import pytest

PROGRAM = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from jaxconv_kernels import pack_mask, sample, sample_sharded
from jaxconv_kernels.sampling import spec

mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
rows = 24
row = np.arange(rows)
keys = jax.random.split(jax.random.key(1), rows)
parameters = dict(
    temperature=np.array([0, 0.7, 1, 1.3], np.float32)[row % 4],
    top_k=np.array([0, 5, 0, 700, 50, 0])[row % 6],
    top_p=np.array([1, 0.9, 1, 0.99, 0.5], np.float32)[row % 5],
    min_p=np.where(row > 19, np.float32(0.02), 0),
)

def sharded(logits, keys, mask):
    def local(logits, keys, mask):
        return sample_sharded(logits, keys, **parameters, mask=mask, axis_name="tensor")
    split = P(None, "tensor")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(split, P(), split), out_specs=P(), check_vma=False
    )(logits, keys, mask)

for vocab, masked in ((512, False), (8 * 2048, True)):
    x = jax.random.normal(jax.random.key(0), (rows, vocab)) * jnp.array([1, 4])[row % 2, None]
    x = x.at[6, [5, 300]].set(jnp.inf).at[7].set(-jnp.inf).at[8, 3].set(jnp.nan)
    mask = pack_mask(jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)) if masked else None
    one = jax.jit(lambda x, keys, mask: sample(x, keys, **parameters, mask=mask))(x, keys, mask)
    four = jax.jit(sharded)(x, keys, mask)
    for name, a, b in zip(one._fields, one, four):
        np.testing.assert_array_equal(a, b, name)
    kinds = np.asarray(one.flags)
    assert vocab == 512 or (kinds & spec.FALLBACK).any(), kinds
    assert (kinds & spec.GREEDY).any() and (kinds & spec.EMPTY).any() and (kinds == 0).any()

try:
    sharded(x[:, : 4 * 2000], keys, None)
except ValueError as refusal:
    assert "logits_shard has 2000 of 8000 tokens; it must have a multiple of 2048" in str(refusal)
else:
    raise AssertionError("a cell on two devices was not refused")
print("same")
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives(run_program):
    assert run_program(PROGRAM).strip() == "same"
