"""The TPU kernel of the sampler, interpreted: the XLA form's results; and what it compiles to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import pack_mask
from jaxconv_kernels.sampling import spec, tpu, xla

# Neither is a multiple of a cell, nor of a vector. Blocks of 8 and of 16 rows, the last one ragged.
PLAIN = ("float32", 5000, 21, False)
MASKED = ("bfloat16", 12_700, 19, True)
CASES = [PLAIN, MASKED]


@functools.cache
def forms(dtype, vocab, rows, masked):
    """(the kernel, the XLA form), compiled once: all that a test varies is data."""

    def compiled(form):
        def call(logits, keys_B2, parameters, mask):
            return form(logits, keys_B2, spec.row_parameters(rows, vocab, **parameters), mask)

        # A program for one batch: what the compiler saves here is more than what it would gain.
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(call, compiler_options=options)

    return compiled(functools.partial(tpu.sample, interpret=True)), compiled(xla.sample)


def batch(case, seed=0):
    """Flat, peaked and tied rows, every kind of parameter, and rows that are decided beforehand."""
    dtype, vocab, rows, masked = case
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, vocab)) * rng.choice([0.5, 2, 6], (rows, 1))
    x[rng.random(x.shape) < 0.01] = np.nan
    x[1, [40, 30]] = np.inf
    x[2] = -np.inf
    x[3, vocab - 1] = 100
    parameters = {
        "temperature": rng.choice([0, 0.3, 1, 1.7], rows).astype(np.float32),
        "top_k": rng.choice([0, 0, 1, 50, 700], rows),
        "top_p": rng.choice([0.01, 0.5, 0.95, 1, 1], rows).astype(np.float32),
        "min_p": rng.choice([0, 0, 0.01, 0.3], rows).astype(np.float32),
    }
    allowed = rng.random((rows, vocab)) < rng.choice([0.001, 0.3, 1], (rows, 1))
    allowed[:, [30, 40]] = True
    mask = pack_mask(jnp.asarray(allowed)) if masked else None
    keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(seed), rows))
    return jnp.asarray(x, dtype), keys_B2, parameters, mask


def assert_same(got, expected):
    for name in ("token", "threshold", "flags"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    for name in ("logprob_raw", "logprob_processed", "kept_mass"):
        arrays = getattr(got, name), getattr(expected, name)
        np.testing.assert_allclose(*arrays, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_xla_form(case):
    kernel, plain = forms(*case)
    seen = set()
    for seed in range(6):
        arrays = batch(case, seed)
        expected = plain(*arrays)
        assert_same(kernel(*arrays), expected)
        seen |= set(np.asarray(expected.flags).tolist())
    flags = spec.FILTERED, spec.FILTERED | spec.FALLBACK, spec.GREEDY, spec.INFINITE, spec.EMPTY
    assert seen > {0, *flags}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_batch_without_filters_skips_to_the_same_results(temperature):
    logits, keys_B2, parameters, mask = batch(PLAIN)
    rows = len(logits)
    parameters = {
        "temperature": np.full(rows, temperature, np.float32),
        "top_k": np.zeros_like(parameters["top_k"]),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
    }
    kernel, plain = forms(*PLAIN)
    arrays = logits, keys_B2, parameters, mask
    assert_same(kernel(*arrays), plain(*arrays))


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_depend_on_the_others(case):
    kernel, _ = forms(*case)
    arrays = batch(case, seed=7)
    order = np.random.default_rng(0).permutation(len(arrays[0]))
    moved = kernel(*jax.tree.map(lambda x: x[order], arrays))
    for one, other in zip(kernel(*arrays), moved, strict=True):
        np.testing.assert_array_equal(one[order], other)


def test_equals_tie_in_the_order_of_their_tokens():
    """All tokens of a row are equal, so that bins hold the first of theirs and all stay in."""
    logits, keys_B2, parameters, _ = batch(PLAIN)
    logits = jnp.zeros_like(logits).at[::2, ::3].set(1.0)
    kernel, plain = forms(*PLAIN)
    expected = plain(logits, keys_B2, parameters, None)
    assert_same(kernel(logits, keys_B2, parameters, None), expected)
    greedy = parameters["temperature"] == 0
    assert greedy.any() and not np.asarray(expected.token)[greedy].any()


# ---------------------------------------------------------------- accelerators

SHAPES = [
    ((8, 151_936), "float32", False),
    ((256, 151_936), "bfloat16", True),
    ((13, 262_143), "bfloat16", False),
    ((64, 262_144), "float32", True),
    ((3, 5000), "float32", True),
]

PROGRAM = """
import jax
from jaxconv_kernels import sample

def call(logits, key_data, temperature, top_k, top_p, min_p, *mask):
    keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    return sample(
        logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        mask=mask[0] if mask else None, implementation="tpu",
    )
"""


def arguments(shape, dtype, masked):
    """[(shape, dtype), …] of `call` above."""
    rows, vocab = shape
    numbers = [((rows,), dtype) for dtype in ("float32", "int32", "float32", "float32")]
    words = [((rows, -(-vocab // 32)), "uint32")] if masked else []
    return [(shape, dtype), ((rows, 2), "uint32"), *numbers, *words]


@pytest.mark.parametrize("shape, dtype, masked", SHAPES)
def test_lowers_to_one_kernel_without_a_tpu(shape, dtype, masked, lower):
    scope = {}
    exec(PROGRAM, scope)
    shapes = [jax.ShapeDtypeStruct(*s) for s in arguments(shape, dtype, masked)]
    assert lower("tpu", scope["call"], *shapes).count("tpu_custom_call") == 1


@pytest.mark.parametrize("vocab", [spec.SMALL_VOCAB, spec.CELL * spec.LANES + 1])
def test_other_vocabularies_go_to_the_xla_form(vocab, lower):
    scope = {}
    exec(PROGRAM, scope)
    shapes = [jax.ShapeDtypeStruct(*s) for s in arguments((2, vocab), "float32", False)]
    assert "tpu_custom_call" not in lower("tpu", scope["call"], *shapes)


@pytest.mark.slow
@pytest.mark.parametrize("shape, dtype, masked", SHAPES)
def test_compiles_for_tpus_with_no_copy_of_the_logits(shape, dtype, masked, compile_for_tpu):
    program = f"{PROGRAM}\nshapes = {arguments(shape, dtype, masked)!r}\n"
    size = shape[0] * shape[1] * jnp.dtype(dtype).itemsize
    for chip, compiled in compile_for_tpu(program).items():
        assert compiled["kernels"] == 1, chip
        # The packed mask, by lanes, and a few numbers a row.
        assert compiled["temporary_bytes"] < max(size // 8, 1 << 20), chip
