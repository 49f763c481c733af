"""`linear_logprob` on eight devices: the values of one, and what the devices tell each other."""

import json

import pytest

SETUP = """
import re
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxconv_kernels import linear_logprob, sharded_linear_logprob
from jaxconv_kernels.linear_logprob import vjp

N, D, V, CAP = 64, 24, 120, 4.0
keys = jax.random.split(jax.random.key(0), 3)
hidden = jax.random.normal(keys[0], (N, D))
lm_head = jax.random.normal(keys[1], (D, V))
targets = jax.random.randint(keys[2], (N,), 0, V)
# The borders of every part that a device may hold.
targets = targets.at[:8].set(jnp.array([0, 14, 15, 29, 30, 59, 60, V - 1]))
temperature = jnp.linspace(0.5, 2, N)
arrays = hidden, lm_head, targets, temperature

def step(form):
    def loss(hidden, lm_head, targets, temperature):
        outputs = form(hidden, lm_head, targets, temperature=temperature, softcap=CAP)
        return jnp.sum(jnp.sin(outputs[0]) + 0.3 * outputs[1]), outputs
    return jax.value_and_grad(loss, (0, 1), has_aux=True)

expected = jax.jit(step(linear_logprob))(*arrays)

def in_chunks():
    vjp._ONE_CHUNK, vjp._CHUNK, vjp._ROWS, vjp._LEAST = 0, 0, 1, 5

def assert_same(got):
    for a, b in zip(jax.tree.leaves(got[0][1]), jax.tree.leaves(expected[0][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)

def collectives(compiled):
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?[(]", compiled.as_text()):
        for dims in re.findall(r"[a-z]+[0-9]+\\[([0-9,]*)\\]", shapes):
            found.append((kind, tuple(int(n) for n in dims.split(",") if n)))
    return found
"""

# Each device has some tokens and some columns; the code of one device asks for the rest.
LOCAL = """
rows = P("data")
specs = P("data"), P(None, AXES), rows, rows
def local(hidden, lm_head, targets, *, temperature, softcap):
    return linear_logprob(
        hidden, lm_head, targets, temperature=temperature, softcap=softcap, axis_name=AXES
    )

def whole(hidden, lm_head, targets, *, temperature, softcap):
    return jax.shard_map(
        lambda h, w, t, T: local(h, w, t, temperature=T, softcap=softcap),
        mesh=mesh, in_specs=specs, out_specs=rows,
    )(hidden, lm_head, targets, temperature)

def inside(check_vma):
    def body(*arrays):
        (total, outputs), (d_hidden, d_head) = step(local)(*arrays)
        if not check_vma:
            d_head = jax.lax.psum(d_head, "data")
        return (jax.lax.psum(total, "data"), outputs), (d_hidden, d_head)
    out_specs = (P(), (rows, rows)), specs[:2]
    return jax.shard_map(
        body, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma
    )

for chunks in (False, True):
    if chunks:
        in_chunks()
    for call in (step(whole), inside(True), inside(False)):
        compiled = jax.jit(call).lower(*arrays).compile()
        assert_same(compiled(*arrays))
        told = collectives(compiled)
        assert not any(kind == "all-gather" for kind, _ in told), told
        assert all(shape[-1:] != (V // 4,) or shape == (D, V // 4) for _, shape in told), told

outside = targets.at[3].set(V)
unknown = jax.jit(step(whole))(hidden, lm_head, outside, temperature)[0][1][0]
assert np.isnan(unknown[3]) and np.isfinite(np.delete(unknown, 3)).all()
print("same")
"""


@pytest.mark.parametrize(
    "axes, names, sizes",
    [
        ("tensor", ("data", "tensor"), (2, 4)),
        pytest.param(*(("a", "b"), ("data", "a", "b"), (2, 2, 2)), marks=pytest.mark.slow),
    ],
    ids=["one axis", "two axes"],
)
def test_columns_on_each_device_under_shard_map(axes, names, sizes, run_program):
    mesh = f"""
AXES = {axes!r}
mesh = jax.make_mesh({sizes}, {names}, axis_types=(AxisType.Auto,) * {len(sizes)})
"""
    assert run_program(SETUP + mesh + LOCAL).strip() == "same"


MESH = """
in_chunks()
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.KIND,) * 3)

def place(rows, head):
    specs = P(rows), head, P(rows), P(rows)
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]

def check(form, rows, head, all_told):
    placed = place(rows, head)
    back = (None, (None, None)), tuple(x.sharding for x in placed[:2])
    compiled = jax.jit(step(form), out_shardings=back).lower(*placed).compile()
    assert_same(compiled(*placed))
    told = collectives(compiled)
    columns = V // 2 if head[1] else V
    parts = {(D, columns), (D // 2, columns)}  # what gathering and summing weights takes
    if all_told:
        assert all(shape in parts or shape[-1:] != (columns,) for _, shape in told), told
        assert sum(shape in parts and kind == "all-gather" for kind, shape in told) <= 1, told
    if head[1]:
        assert not any(V in shape for _, shape in told), told

BOTH = "data", "fsdp"
"""

AUTO = """
for rows, head in ((BOTH, P(None, "tensor")), (BOTH, P("fsdp", None)), (None, P("fsdp", "tensor"))):
    def form(*arrays, **options):
        return sharded_linear_logprob(*arrays, **options, mesh=mesh, rows=rows, head=head)
    check(form, rows, head, True)
# Without being told, the compiler keeps the columns apart, but adds up a product over its width.
check(linear_logprob, BOTH, P(None, "tensor"), True)
check(linear_logprob, BOTH, P("fsdp", "tensor"), False)
try:
    sharded_linear_logprob(*arrays[:3], mesh=mesh, rows=BOTH, head=P(None, "data"))
except ValueError as error:
    print(error)
"""

EXPLICIT = """
heads = P(None, "tensor"), P("fsdp", None), P("fsdp", "tensor")
for rows, head in zip((BOTH, "data", BOTH), heads, strict=True):
    check(linear_logprob, rows, head, True)
outputs = jax.jit(linear_logprob)(*place("data", P("fsdp", "tensor"))[:3])
assert [jax.typeof(x).sharding.spec for x in outputs] == [P("data")] * 2, outputs
print("same")
"""


def test_whole_arrays_on_a_mesh_of_auto_axes(run_program):
    said = run_program(SETUP + MESH.replace("KIND", "Auto") + AUTO).strip()
    assert said == (
        "mesh axis 'data' splits the vocabulary and the tokens or the width; "
        "it must split one of them"
    )


@pytest.mark.slow
def test_whole_arrays_on_a_mesh_of_explicit_axes(run_program):
    assert run_program(SETUP + MESH.replace("KIND", "Explicit") + EXPLICIT).strip() == "same"


# ---------------------------------------------------------------- accelerators

# A training step's shapes on the four chips of a slice: tokens and width over one axis, the
# vocabulary over the other.
TPU_PROGRAM = """
import json
import re
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxconv_kernels import sharded_linear_logprob

rows, width, vocab = 16_384, 1024, 151_936
kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
found = {}
for chip, topology in TOPOLOGIES.items():
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:4]
    mesh = Mesh(np.reshape(devices, (2, 2)), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def loss(hidden, lm_head, targets):
        logprob, entropy = sharded_linear_logprob(
            hidden, lm_head, targets, mesh=mesh, rows="fsdp", head=P("fsdp", "tensor"),
            temperature=0.7, softcap=30.0,
        )
        return logprob.sum() + 0.1 * entropy.sum()

    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((rows, width), "bfloat16", P("fsdp")),
            ((width, vocab), "bfloat16", P("fsdp", "tensor")),
            ((rows,), "int32", P("fsdp")),
        )
    ]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    told = set()
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?[(]", compiled.as_text()):
        for dims in re.findall(r"[a-z]+[0-9]+\\[([0-9,]+)\\]", shapes):
            told.add((kind, tuple(int(n) for n in dims.split(","))))
    found[chip] = compiled.memory_analysis().temp_size_in_bytes, sorted(told)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiles_for_four_chips_of_a_slice(run_with_libtpu):
    """Logits of a chunk take 0.6 GB and the gradient of a device's columns, in float32, 0.3 GB;
    all its logits would take 2.5 GB."""
    chips = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
    printed = run_with_libtpu(f"TOPOLOGIES = {chips!r}\n{TPU_PROGRAM}")
    columns = 151_936 // 2
    for chip, (temporary_bytes, told) in json.loads(printed.splitlines()[-1]).items():
        assert temporary_bytes < 1.5e9, chip
        parts = [1024, columns], [512, columns]
        weights = [kind for kind, shape in told if shape in parts]
        assert weights.count("all-gather") == 1 and len(weights) == 2, (chip, told)
        # Of tokens: their statistics and the gradients of their hidden states, never logits.
        others = [shape for _, shape in told if shape not in parts]
        assert others and not any(columns in shape for shape in others), (chip, told)
