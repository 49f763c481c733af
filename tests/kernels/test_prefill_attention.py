"""Prefill attention: each form against the textbook, what it does not read, what it compiles to."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxconv_kernels import prefill_attention
from jaxconv_kernels.prefill_attention import cudnn, running, tpu, xla

OPTIONS = [
    {"scale": 0.3, "window": None, "softcap": None},
    {"scale": 1.0, "window": 40, "softcap": 5.0},
    {"scale": 0.1, "window": 700, "softcap": None},
]


def draw(pieces, queries, rows, heads, kv_heads, keys, width, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    cache = (rows, kv_heads, keys, width)
    shapes = (pieces, queries, heads, width), cache, cache
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def textbook(q, k, v, rows, start, count, scale, window, softcap):
    """Query by query and head by head, in float64, over the visible keys alone."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[1]
    out = np.zeros_like(q)
    for piece, (row, begin, real) in enumerate(zip(rows, start, count, strict=True)):
        for t in range(real):
            first = 0 if window is None else max(0, begin + t + 1 - window)
            for head in range(q.shape[2]):
                keys, values = (x[row, head // group, first : begin + t + 1] for x in (k, v))
                scores = scale * keys @ q[piece, t, head]
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                mass = np.exp(scores - scores.max())
                out[piece, t, head] = mass @ values / mass.sum()
    return out


def run_xla(q, k, v, rows, start, count, **options):
    return xla.attend(q, k, v, rows, start, **options)


run_tpu = jax.jit(
    functools.partial(tpu.attend, interpret=True), static_argnames=("scale", "window", "softcap")
)

# Several blocks of queries and of keys; a row of its own past the cache is padding.
QUERIES, KEYS, ROWS = 140, 1100, 3
PIECES = {"rows": [2, 0, 5, 1], "start": [0, 700, 3, 960], "count": [140, 77, 0, 140]}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("attend", [run_xla, run_tpu])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (5, 1)])
def test_every_form_is_the_textbook(attend, options, heads, kv_heads):
    arrays = draw(4, QUERIES, ROWS, heads, kv_heads, KEYS, 8)
    got = attend(*arrays, *map(jnp.asarray, PIECES.values()), **options)
    expected = textbook(*arrays, *PIECES.values(), **options)
    for piece, real in enumerate(PIECES["count"]):
        np.testing.assert_allclose(got[piece, :real], expected[piece, :real], rtol=1e-5, atol=1e-5)
    assert np.isfinite(got).all()


@settings(max_examples=20, deadline=None)
@given(
    piece=st.tuples(st.integers(0, 100), st.integers(1, 30)),
    window=st.sampled_from([None, 1, 33]),  # each is compiled by itself
    seed=st.integers(0, 99),
)
def test_any_pieces_and_windows(piece, window, seed):
    arrays = draw(1, 30, 2, 4, 2, 133, 8, seed=seed)
    where = [1], [piece[0]], [piece[1]]
    options = {"scale": 0.5, "window": window, "softcap": None}
    expected = textbook(*arrays, *where, **options)
    for attend in (run_xla, run_tpu):
        got = attend(*arrays, *map(jnp.asarray, where), **options)
        np.testing.assert_allclose(
            got[0, : piece[1]], expected[0, : piece[1]], rtol=1e-5, atol=1e-5
        )


def test_blocks_out_of_sight_are_not_read():
    """NaN stands in every block of keys that no query sees, and in every other row."""
    q, k, v = draw(1, 20, 3, 4, 2, 2048, 8)
    start, window = 1030, 100
    block = np.arange(2048) // 512
    seen = (block >= (start + 1 - window) // 512) & (block <= (start + 19) // 512)
    own = np.arange(3) == 1
    k_seen, v_seen = (
        jnp.where((own[:, None] & seen)[:, None, :, None], x, jnp.nan) for x in (k, v)
    )
    where = (jnp.asarray([1]), jnp.asarray([start]), jnp.asarray([20]))
    options = {"scale": 0.3, "window": window, "softcap": None}
    got = run_tpu(q, k_seen, v_seen, *where, **options)
    np.testing.assert_array_equal(got, run_tpu(q, k, v, *where, **options))
    assert np.isfinite(got).all()


def test_half_precision_stays_near():
    arrays = draw(4, 40, ROWS, 6, 2, KEYS, 64, "bfloat16")
    where = tuple(map(jnp.asarray, (PIECES["rows"], PIECES["start"], [40, 40, 0, 40])))
    options = {"scale": 0.125, "window": None, "softcap": None}
    got, expected = (attend(*arrays, *where, **options) for attend in (run_tpu, run_xla))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got[:2], np.float32), np.asarray(expected[:2], np.float32), atol=0.02
    )


def test_the_platform_picks_the_form(monkeypatch):
    q, k, _ = draw(1, 4, 1, 4, 2, 32, 64, "bfloat16")
    assert running(None, q, k, None) == "xla"
    assert running("gpu", q, k, None) == "cudnn"
    assert running("gpu", q, k, 5.0) == "xla"
    assert running("gpu", q.astype("float32"), k, None) == "xla"
    assert not cudnn.takes(q[..., :60], k[..., :60], None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert running(None, q, k, 5.0) == "tpu"
    with pytest.raises(ValueError, match="implementation='cuda'; it must be one of xla, tpu, gpu"):
        running("cuda", q, k, None)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"rows": jnp.zeros(2, jnp.int32)}, r"rows has shape \(2,\); it must be \(1,\)"),
        ({"q": jnp.zeros((1, 4, 3, 8))}, "q has 3 heads of 8; they must be a multiple of"),
        ({"v": jnp.zeros((1, 2, 31, 8))}, "they must be .* twice"),
        ({"v": jnp.zeros((1, 2, 32, 8), "bfloat16")}, "of one type"),
    ],
)
def test_refuses_what_does_not_fit(change, why):
    q, k, v = draw(1, 4, 1, 4, 2, 32, 8)
    one = jnp.ones(1, jnp.int32)
    arrays = {"q": q, "k": k, "v": v, "rows": one, "start": one, "count": one} | change
    with pytest.raises(ValueError, match=why):
        prefill_attention(*arrays.values(), scale=1.0)


@pytest.mark.parametrize(
    "platform, implementation, target",
    [("tpu", "tpu", "tpu_custom_call"), ("cuda", "gpu", "__cudnn$fmhaScaleBiasSoftmax")],
)
def test_lowers_for_accelerators(lower, platform, implementation, target, monkeypatch):
    # What jax would ask the installed cuDNN for.
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91_000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", versions)
    shapes = [((4, 64, 8, 128), "bfloat16"), *[((4, 2, 512, 128), "bfloat16")] * 2]
    shapes += [((4,), "int32")] * 3
    call = functools.partial(
        prefill_attention, scale=0.1, window=100, implementation=implementation
    )
    assert target in lower(platform, call, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


PROGRAM = """
import functools
from jaxconv_kernels import prefill_attention

cases = {}
for name, (n, queries, rows, heads, kv_heads, keys, width, dtype, window, cap) in models.items():
    call = functools.partial(
        prefill_attention, scale=0.1, window=window, softcap=cap, implementation="tpu"
    )
    cache, piece = ((rows, kv_heads, keys, width), dtype), ((n,), "int32")
    cases[name] = call, [((n, queries, heads, width), dtype), cache, cache, piece, piece, piece]
"""

# Pieces, queries, rows, query heads, key heads, keys, width of a head, dtype, window, soft cap.
MODELS = {
    "half a vector wide": (16, 256, 64, 14, 2, 2048, 64, "bfloat16", None, None),
    "float32": (16, 64, 64, 14, 2, 2048, 128, "float32", None, None),
    "odd group, short": (3, 5, 4, 9, 3, 1000, 80, "bfloat16", None, None),
    "tiny": (2, 16, 2, 4, 2, 40, 16, "float32", None, None),
    "window and cap": (4, 1024, 8, 8, 4, 8192, 256, "bfloat16", 4096, 50.0),
    "long": (4, 2048, 16, 28, 4, 32_768, 128, "bfloat16", None, None),
    "a key head a query head": (4, 512, 16, 64, 64, 4096, 128, "bfloat16", None, None),
}


@pytest.mark.slow
def test_compiles_for_tpus_and_copies_no_cache_of_whole_vectors(compile_cases_for_tpu):
    compiled = compile_cases_for_tpu(f"models = {MODELS!r}\n{PROGRAM}")
    assert set(compiled) == set(MODELS)
    for name, by_chip in compiled.items():
        pieces, queries, rows, heads, kv_heads, keys, width, dtype, *_ = MODELS[name]
        size = 2 if dtype == "bfloat16" else 4
        lanes = -(-width // 128) * 128
        asked = pieces * max(queries, 16) * heads * lanes * size
        cache = 2 * rows * kv_heads * keys * lanes * size
        for chip, done in by_chip.items():
            assert done["kernels"] == 1, (name, chip)
            # The queries and what comes out are laid out head by head; narrow heads in lanes, once.
            allowed = (1 << 20) + 4 * asked + (0 if width == lanes else 1.1 * cache)
            assert done["temporary_bytes"] <= allowed, (name, chip, done)
