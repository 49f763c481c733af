"""Decode attention: every form against the textbook, what it must not read, what it compiles to."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxconv_kernels.decode_attention import api, decode_attention, gpu, tpu, xla

TPU = AbstractMesh(
    (),
    (),
    abstract_device=AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
)


def draw(rows, heads, kv_heads, keys, width, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, heads, width), (rows, kv_heads, keys, width), (rows, kv_heads, keys, width)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def textbook(q, k, v, lengths, scale, window, softcap):
    """Row by row and head by head, in float64, over the visible keys alone."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for row, length in enumerate(np.minimum(lengths, k.shape[2])):
        first = 0 if window is None else max(0, length - window)
        for head in range(q.shape[1]):
            keys, values = (x[row, head // group, first:length] for x in (k, v))
            scores = scale * keys @ q[row, head]
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            mass = np.exp(scores - scores.max())
            out[row, head] = mass @ values / mass.sum()
    return out


interpreted_step = jax.jit(
    functools.partial(tpu.write_and_attend, block=128, interpret=True),
    static_argnames=("scale", "window", "softcap"),
)


def run_tpu(q, k, v, lengths, **options):
    """Attention to the first `lengths` keys, of which the kernel is given the last to write."""
    at = jnp.arange(len(lengths)), slice(None), lengths - 1
    own = (x.at[at].get(mode="clip") for x in (k, v))
    before = (x.at[at].set(jnp.nan, mode="drop") for x in (k, v))
    out, *written = interpreted_step(q, *own, *before, lengths - 1, **options)
    for cache, expected in zip(written, (k, v), strict=True):
        np.testing.assert_array_equal(cache, expected)
    return out


OPTIONS = [
    {"scale": 0.3, "window": None, "softcap": None},
    {"scale": 1.0, "window": 40, "softcap": 5.0},
    {"scale": 0.1, "window": 200, "softcap": None},
]
# Caches end within the last tile of a block of 128. Interpreters of later versions of jax pad an
# aliased array both to its blocks and to its tiles, and refuse where these end elsewhere.
KEYS = 382
LENGTHS = [1, 7, 128, 129, 382, 400]  # the last is behind the cache's end


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("attend", [xla.attend, run_tpu])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_every_form_is_the_textbook(attend, options, heads, kv_heads):
    arrays = draw(len(LENGTHS), heads, kv_heads, KEYS, 16)
    got = attend(*arrays, jnp.asarray(LENGTHS), **options)
    np.testing.assert_allclose(got, textbook(*arrays, LENGTHS, **options), rtol=1e-5, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 250), min_size=2, max_size=2),
    window=st.none() | st.integers(1, 260),
    seed=st.integers(0, 99),
)
def test_any_lengths_and_windows(lengths, window, seed):
    arrays = draw(2, 4, 2, 250, 8, seed=seed)
    options = {"scale": 0.5, "window": window, "softcap": None}
    expected = textbook(*arrays, lengths, **options)
    for attend in (xla.attend, run_tpu):
        got = attend(*arrays, jnp.asarray(lengths), **options)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_what_lies_beyond_a_row_is_not_read():
    """NaN stands in every block that is out of a row's sight, and behind its end in the last."""
    lengths, window = jnp.asarray([5, 128, 390]), 100
    q, k, v = draw(3, 4, 2, 512, 16)
    position, last = jnp.arange(512), lengths[:, None]
    seen = (position < last) & (position // 128 >= jnp.maximum(last - window, 0) // 128)
    hidden_k, hidden_v = (jnp.where(seen[:, None, :, None], x, jnp.nan) for x in (k, v))
    options = {"scale": 0.3, "window": window, "softcap": None}
    got = run_tpu(q, hidden_k, hidden_v, lengths, **options)
    np.testing.assert_array_equal(got, run_tpu(q, k, v, lengths, **options))
    assert np.isfinite(got).all()


def run_xla(q, *arrays, **options):
    return decode_attention(q, *arrays, **options, implementation="xla")


@pytest.mark.parametrize("step", [run_xla, interpreted_step])
def test_a_row_behind_the_end_is_finite_and_leaves_the_others_alone(step):
    q, k, v = draw(2, 4, 2, 128, 16)
    options = {"scale": 0.3, "window": None, "softcap": None}
    own = k[:, :, 7], v[:, :, 7]
    out, *written = step(q, *own, k, v, jnp.asarray([128, 60]), **options)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(
        out[1], step(q, *own, k, v, jnp.asarray([9, 60]), **options)[0][1]
    )
    for cache, before in zip(written, (k, v), strict=True):
        np.testing.assert_array_equal(cache[0], before[0])


@pytest.mark.parametrize("keys, dtype", [(5, "bfloat16"), (KEYS, "float32"), (KEYS, "bfloat16")])
def test_the_kernel_writes_what_a_scatter_writes(keys, dtype):
    """All else stays, to the bit, in caches that end within a tile or within a block."""
    edges = [p for p in (0, 7, 8, 15, 16, 31, 127, 128, 256) if p < keys]
    drawn = np.random.default_rng(0).integers(0, keys, 6)
    positions = jnp.asarray([*edges, *drawn, keys - 1, keys, keys + 20])
    rows = len(positions)
    q, k, v = draw(rows, 4, 2, keys, 8, dtype)
    _, *own = draw(rows, 4, 2, 1, 8, dtype, seed=1)
    own = [x[:, :, 0] for x in own]
    options = {"scale": 0.3, "window": None, "softcap": None}
    out, *written = interpreted_step(q, *own, k, v, positions, **options)
    expected, *scattered = run_xla(q, *own, k, v, positions, **options)
    for cache, other in zip(written, scattered, strict=True):
        assert cache.dtype == dtype
        np.testing.assert_array_equal(cache, other)
    tolerance = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(
        out.astype("float32"), expected.astype("float32"), rtol=tolerance, atol=tolerance
    )


def test_half_precision_is_near_the_whole():
    arrays = draw(3, 14, 2, 256, 64, "bfloat16")
    options = {"scale": 0.125, "window": None, "softcap": None}
    expected = textbook(*arrays, [256, 100, 3], **options)
    for attend in (xla.attend, run_tpu):
        got = attend(*arrays, jnp.asarray([256, 100, 3]), **options)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.02)


# ---------------------------------------------------------------- the GPU kernel


def interpreted_on_cpu():
    """Parameters of Pallas's GPU interpreter, where it knows the operations that are used."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:
        pytest.skip("this version of jax cannot interpret Mosaic GPU kernels on a CPU")
    return InterpretGPUParams()


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("splits, width", [(1, 64), (3, 64), (2, 256)])
def test_the_gpu_kernel_is_the_textbook(options, splits, width):
    interpret = interpreted_on_cpu()
    lengths = [1, 64, 320, 200]
    arrays = draw(4, 14, 2, 320, width, "bfloat16")
    got = gpu.attend(*arrays, jnp.asarray(lengths), **options, splits=splits, interpret=interpret)
    expected = textbook(*arrays, lengths, **options)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.03)


@pytest.mark.parametrize(
    "shape, said",
    [
        ((4, 2, 128, 64, "float32"), "16-bit"),
        ((4, 2, 128, 80, "bfloat16"), "80 wide"),
        ((4, 2, 100, 64, "bfloat16"), "100 positions"),
        ((96, 1, 128, 64, "bfloat16"), "96 query heads"),
    ],
)
def test_the_gpu_kernel_says_what_it_does_not_take(shape, said, monkeypatch):
    q, k, v = draw(1, *shape)
    with pytest.raises(ValueError, match=said):
        gpu.attend(q, k, v, jnp.ones(1), **OPTIONS[0])
    pretend(monkeypatch, "gpu", "9.0")
    assert api.running(None, q, k) == "xla"


# ---------------------------------------------------------------- one call, all platforms


def pretend(monkeypatch, platform, capability=None):
    """Makes this the platform for all who ask."""
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])


def test_the_platform_picks_and_an_unknown_name_is_refused(monkeypatch):
    q, k, v = draw(1, 4, 2, 128, 64, "bfloat16")
    own = k[:, :, 0], v[:, :, 0]
    for platform, capability, expected in (
        ("cpu", None, "xla"),
        ("tpu", None, "tpu"),
        ("gpu", "9.0", "gpu"),
        ("gpu", "10.0", "xla"),
    ):
        pretend(monkeypatch, platform, capability)
        assert api.running(None, q, k) == expected
    with pytest.raises(ValueError, match="'cuda'; it must be one of xla, tpu, gpu"):
        decode_attention(q, *own, k, v, jnp.zeros(1, int), scale=1.0, implementation="cuda")


# Query, new key and value, cache of keys and of values.
SHAPES = (8, 28, 128), (8, 4, 128), (8, 4, 128), (8, 4, 1024, 128), (8, 4, 1024, 128)


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("name, platform", [("tpu", "tpu"), ("gpu", "cuda")])
def test_kernels_lower_on_a_machine_without_accelerators(name, platform, options):
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in SHAPES]
    call = jax.jit(lambda *arrays: decode_attention(*arrays, implementation=name, **options))
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    chip = jax.sharding.use_abstract_mesh(TPU) if name == "tpu" else contextlib.nullcontext()
    with chip:
        lowered = export.export(call, platforms=[platform], disabled_checks=unchecked)(
            *shapes, jax.ShapeDtypeStruct((8,), "int32")
        )
    target = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}[platform]
    assert target in lowered.mlir_module()


@pytest.mark.parametrize("window, visible", [(None, 1024), (100, 100)])
def test_the_tpu_kernel_tells_what_full_rows_cost(window, visible):
    step = functools.partial(
        decode_attention, scale=1.0, window=window, softcap=None, implementation="tpu"
    )
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in SHAPES]
    jaxpr = jax.make_jaxpr(step)(*shapes, jax.ShapeDtypeStruct((8,), "int32"))
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "pallas_call")
    cost = call.params["cost_estimate"]
    assert cost.flops == 2 * 2 * 8 * 28 * visible * 128
    assert cost.transcendentals == 8 * 28 * visible
    assert cost.bytes_accessed == 2 * (2 * 8 * 4 * visible * 128 + 2 * 8 * 28 * 128)
