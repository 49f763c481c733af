"""The sampler's Mosaic GPU kernels: interpreted on a CPU against the XLA form, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import pack_mask, sample
from jaxconv_kernels.sampling import cells, fallback, finish, gpu, gpu_exact, spec, xla
from jaxconv_kernels.sampling.axis import Axis

# One row each: plain, tempered, top-k, top-p, both and min-p, greedy, more than the candidates
# hold, +inf, nothing allowed.
PARAMETERS = {
    "temperature": [1, 0.5, 0.5, 1, 1.3, 0, 2, 1, 1],
    "top_k": [0, 0, 50, 0, 10, 3, 0, 5, 0],
    "top_p": [1, 1, 1, 0.5, 0.8, 0.5, 0.9, 1, 1],
    "min_p": [0, 0, 0, 0, 0.02, 0, 0, 0, 0.5],
}
ROWS = len(PARAMETERS["top_k"])


def batch(dtype, vocab=5000):
    """Rows for `PARAMETERS`, some of them tied; (logits, key data, parameters, packed mask)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, vocab)) * np.array([3, 1, 1, 4, 4, 2, 1, 3, 3])[:, None]
    x[2] = np.round(x[2], 1)
    x[4, :50] = np.nan
    x[5, [70, 4500]] = 99
    x[7, [300, 4900]] = np.inf
    allowed = rng.random((ROWS, vocab)) < 0.7
    allowed[7, 300] = True
    allowed[8] = False
    keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(1), ROWS))
    parameters = spec.row_parameters(
        ROWS, vocab, **{name: np.asarray(value) for name, value in PARAMETERS.items()}
    )
    return jnp.asarray(x, dtype), keys_B2, parameters, pack_mask(jnp.asarray(allowed))


def interpreter():
    """Pallas's parameters for running a kernel as plain operations; skips where it has none."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:
        pytest.skip("this version of jax cannot interpret Mosaic GPU kernels on a CPU")
    return InterpretGPUParams()


@pytest.mark.parametrize("dtype, masked, parts", [("float32", False, 1), ("bfloat16", True, 2)])
def test_it_draws_what_the_xla_form_draws(dtype, masked, parts):
    interpret = interpreter()
    logits, keys_B2, parameters, mask = batch(dtype)
    mask = mask if masked else None
    got = gpu.sample(logits, keys_B2, parameters, mask, parts=parts, interpret=interpret)
    expected = jax.jit(xla.sample)(logits, keys_B2, parameters, mask)
    flags = np.asarray(got.flags)
    assert flags[5] == spec.GREEDY and flags[7] == spec.INFINITE
    assert flags[6] == spec.FILTERED | spec.FALLBACK
    assert flags[8] == (spec.EMPTY if masked else spec.FILTERED)
    for name in ("token", "threshold", "flags"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    # The kept mass is a sum in another order: to rounding.
    for name in ("logprob_raw", "logprob_processed", "kept_mass"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-6, err_msg=name
        )


# Of each row to do: flat logits, top-k, top-p, both, min-p, more than the allowed, all kept, none
# but the largest.
FLAT = {
    "top_k": [0, 2000, 0, 900, 700, 4000, 0, 0],
    "top_p": [0.9, 1, 0.5, 0.95, 1, 0.99, 1 - 2.0**-24, 0],
    "min_p": [0, 0, 0, 0, 0.05, 0, 0, 0],
}


@pytest.mark.parametrize("dtype, masked", [("float32", False), ("bfloat16", True)])
def test_exact_passes_find_what_they_find_in_xla(dtype, masked):
    interpret = interpreter()
    rows, vocab = 2 * len(FLAT["top_k"]), 5000
    rng = np.random.default_rng(3)
    allowed = np.where(rng.random((rows, vocab)) < 0.7, True, not masked)
    logits = jnp.asarray(rng.normal(size=(rows, vocab)), dtype)
    todo = np.arange(rows) % 2 == 0
    x = jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)
    parameters = spec.row_parameters(
        rows, vocab, 1.3, *(np.repeat(FLAT[name], 2) for name in ("top_k", "top_p", "min_p"))
    )
    keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(2), rows))
    by_cell = cells.by_cell(x, small=False)
    largest = cells.cell_largest(by_cell)
    row, _ = cells.merged(cells.statistics(by_cell, largest, parameters.scale), parameters.scale)
    mask = gpu._by_lane(pack_mask(jnp.asarray(allowed)), vocab) if masked else None
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % 128)), constant_values=-jnp.inf)
    got = gpu_exact.draw(
        jnp.asarray(todo),
        jnp.pad(largest, ((0, 0), (0, 125)), constant_values=-jnp.inf),
        padded.reshape(rows, -1, 128),
        mask,
        keys_B2,
        row,
        parameters,
        interpret=interpret,
    )
    zeros = jnp.zeros(rows)
    token, kept = fallback.draw_exactly(
        lambda at: x[at],
        jnp.asarray(todo),
        row,
        parameters,
        keys_B2,
        jnp.zeros(rows, jnp.int32),
        finish.Kept(zeros, zeros, zeros),
        Axis(),
    )
    np.testing.assert_array_equal(np.asarray(got.token)[todo], token[todo])
    np.testing.assert_array_equal(np.asarray(got.threshold)[todo], kept.threshold[todo])
    np.testing.assert_allclose(np.asarray(got.kept_mass)[todo], kept.mass[todo], rtol=1e-6)


def test_bits_of_the_mask_lie_by_lane():
    allowed = np.random.default_rng(2).random((2, 5000)) < 0.5
    words = np.asarray(gpu._by_lane(pack_mask(jnp.asarray(allowed)), 5000))
    assert words.shape == (2, 3, 128)
    cell, row, lane = np.unravel_index(np.arange(5000), (3, 16, 128))
    np.testing.assert_array_equal((words[:, cell, lane] >> row) & 1, allowed)
    assert not (words[:, 2] >> 8).any()  # past the vocabulary


@pytest.mark.parametrize("vocab, kernels", [(4096, 0), (50257, 3), (151936, 3)])
@pytest.mark.parametrize("rows, dtype, masked", [(256, "float32", False), (3, "bfloat16", True)])
def test_it_lowers_on_a_machine_without_a_gpu(rows, dtype, masked, vocab, kernels, lower):
    def call(logits, keys_B2, mask, temperature, top_k, top_p, min_p):
        return sample(
            logits,
            jax.random.wrap_key_data(keys_B2),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            mask=mask if masked else None,
            implementation="gpu",
        )

    shapes = [
        jax.ShapeDtypeStruct((rows, *rest), kind)
        for rest, kind in (
            ((vocab,), dtype),
            ((2,), "uint32"),
            ((-(-vocab // 32),), "uint32"),
            ((), "float32"),
            ((), "int32"),
            ((), "float32"),
            ((), "float32"),
        )
    ]
    # One kernel reads, one draws, one takes the exact passes; a small vocabulary needs neither.
    assert lower("cuda", call, *shapes).count("@mosaic_gpu_v2") == kernels
