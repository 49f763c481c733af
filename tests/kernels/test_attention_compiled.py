"""Attention over rows of tokens, as models train with it, compiled or lowered for accelerators."""

import types

import jax
import jax.numpy as jnp
import pytest

from jaxconv.models.attention import causal_attention
from jaxconv.models.config import DecoderConfig

PROGRAM = """
import jax
import jax.numpy as jnp
from jaxconv.models.attention import causal_attention
from jaxconv.models.config import DecoderConfig

def case(rows, length, heads, kv_heads, width, dtype, window, softcap, *, backward):
    config = DecoderConfig(
        family="gemma2" if window else "llama", vocab_size=32, embed_dim=32, num_layers=1,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=width, mlp_dim=32, max_positions=length,
        sliding_window=window, attention_softcap=softcap, dtype=dtype, kernels="tpu",
    )
    def forward(q, k, v, segments):
        return causal_attention(q, k, v, segments, config, window)
    def loss(q, k, v, segments):
        return forward(q, k, v, segments).astype(jnp.float32).sum()
    shapes = [((rows, length, n, width), dtype) for n in (heads, kv_heads, kv_heads)]
    call = jax.grad(loss, (0, 1, 2)) if backward else forward
    return call, [*shapes, ((rows, length), "int32")]

cases = {
    (name, way): case(*model, backward=way == "backward")
    for name, model in models.items() for way in ("forward", "backward")
}
cases = {" ".join(key): value for key, value in cases.items()}
"""

# Rows, tokens, query heads, key heads, width of a head, dtype, window, soft cap.
MODELS = {
    "narrow": (8, 2048, 14, 2, 64, "bfloat16", None, None),
    "windowed": (4, 2048, 8, 4, 256, "bfloat16", 512, 50.0),
    "long": (1, 8192, 28, 4, 128, "bfloat16", None, None),
    "padded": (2, 300, 9, 3, 80, "float32", None, None),
}


@pytest.mark.slow
def test_splash_attention_compiles_for_tpus_forward_and_backward(compile_cases_for_tpu):
    compiled = compile_cases_for_tpu(f"models = {MODELS!r}\n{PROGRAM}")
    for name, (rows, length, heads, _, width, dtype, *_) in MODELS.items():
        # Of what is as large as the queries, padded to lanes, and no scores.
        queries = rows * (length + 127) * heads * max(width, 128) * jnp.dtype(dtype).itemsize
        for way, kernels, arrays in (("forward", 1, 4), ("backward", 3, 8)):
            for chip, found in compiled[f"{name} {way}"].items():
                assert found["kernels"] == kernels, (name, way, chip)
                assert found["temporary_bytes"] <= arrays * queries, (name, way, chip)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [255, 256])
def test_cudnn_attention_lowers_without_a_gpu_forward_and_backward(
    packed, window, length, lower, monkeypatch
):
    # What jax would ask the installed cuDNN for.
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91_000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", versions)
    config = DecoderConfig(
        family="llama",
        vocab_size=32,
        embed_dim=32,
        num_layers=1,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=32,
        max_positions=512,
        dtype="bfloat16",
        kernels="gpu",
    )

    def loss(q, k, v, segments):
        out = causal_attention(q, k, v, segments if packed else None, config, window)
        return out.astype(jnp.float32).sum()

    # An odd length is filled up to an even one, which the backward pass needs.
    shapes = [jax.ShapeDtypeStruct((2, length, heads, 64), "bfloat16") for heads in (14, 2, 2)]
    segments = jax.ShapeDtypeStruct((2, length), "int32")
    module = lower("cuda", jax.grad(loss, (0, 1, 2)), *shapes, segments)
    call = "__cudnn$fmhaScaleBiasSoftmax" if packed else "__cudnn$fmhaSoftmax"
    assert module.count(f"@{call}(") == module.count(f"@{call}Backward(") == 1
    # The scores are made nowhere else; only packed rows have a mask, which the heads share.
    assert "14x256x256" not in module
    assert ("256x256" in module) == packed


MESHES = """
import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxconv.models.attention import layer_attention
from jaxconv.models.config import DecoderConfig
from jaxconv.models.sharding import device_mesh

config = DecoderConfig(
    family="llama", vocab_size=32, embed_dim=32, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=128, mlp_dim=32, max_positions=512, dtype="bfloat16", kernels="tpu",
)
for sizes in ({"fsdp": 4}, {"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}):
    mesh = device_mesh(**sizes)
    rows = tuple(axis for axis in ("data", "fsdp") if axis in sizes)
    spec = NamedSharding(mesh, P(rows, None, "tensor" if "tensor" in sizes else None))
    q, k = (jax.ShapeDtypeStruct((8, 256, n, 128), "bfloat16", sharding=spec) for n in (4, 2))

    def loss(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = layer_attention(q, k, v, None, config, jnp.bool_(False))
        return out.astype(jnp.float32).sum()

    lowered = export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(q, k, k)
    print(lowered.mlir_module().count("tpu_custom_call"))
"""


def test_splash_attention_of_split_rows_and_heads_lowers_on_any_mesh(run_program):
    """Also on meshes with axes of one device, which Pallas does not leave to the compiler."""
    kernels = run_program(MESHES, JAX_NUM_CPU_DEVICES="4").split()
    assert kernels == ["3"] * 3  # forward, and two of the backward pass
