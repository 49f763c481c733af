"""The sampler's kernels, interpreted, on vocabularies that they read in several pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels.sampling import gpu, spec, tpu, xla


def batch(rows: int, vocab: int):
    """Peaked and flat rows in turn; rows without filters, with top-k and with top-p."""
    rng = np.random.default_rng(0)
    row = np.arange(rows)
    x = rng.normal(size=(rows, vocab)) * np.where(row % 2, 1.0, 6.0)[:, None]
    parameters = spec.row_parameters(
        rows,
        vocab,
        temperature=np.array([1.0, 0.7])[row % 2],
        top_k=np.array([0, 40, 0])[row % 3],
        top_p=np.array([1.0, 1.0, 0.9])[row % 3],
        min_p=np.zeros(rows),
    )
    keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(2), rows))
    return jnp.asarray(x, jnp.float32), keys_B2, parameters, None


def assert_same(got, expected):
    for name in ("token", "threshold", "flags"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    for name in ("logprob_raw", "logprob_processed", "kept_mass"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_the_tpu_kernel_carries_its_state_from_piece_to_piece():
    arrays = batch(8, 70_001)
    expected = jax.jit(xla.sample)(*arrays)
    flags = np.asarray(expected.flags)
    assert (flags & spec.FALLBACK > 0).any() and (flags == 0).any()
    assert_same(tpu.sample(*arrays, interpret=True), expected)


@pytest.mark.slow
def test_the_gpu_kernels_put_segments_of_cells_in_order():
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:
        pytest.skip("this version of jax cannot interpret Mosaic GPU kernels on a CPU")
    # More than 64 cells, whose sums are finished a segment at a time.
    arrays = batch(3, 133_120)
    got = gpu.sample(*arrays, parts=1, interpret=InterpretGPUParams())
    assert_same(got, jax.jit(xla.sample)(*arrays))
