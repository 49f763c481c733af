"""Masked reductions against numpy on the selected entries."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxconv.objectives import masked

NUMPY = {
    "masked_sum": np.sum,
    "masked_mean": np.mean,
    "masked_std": np.std,
    "masked_max": np.max,
}


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32)),
    mask=hnp.arrays(bool, (3, 5)),
    name=st.sampled_from(sorted(NUMPY)),
)
def test_equals_numpy_on_what_is_selected(x, mask, name):
    mask[0, 0] = True
    spoiled = np.where(mask, x, np.nan)
    got = getattr(masked, name)(spoiled, mask)
    np.testing.assert_allclose(got, NUMPY[name](x[mask].astype(np.float64)), rtol=1e-4, atol=1e-3)
    by_row = getattr(masked, name)(spoiled, mask.astype(np.int32), axis=1)
    for b in range(3):
        if mask[b].any():
            want = NUMPY[name](x[b][mask[b]].astype(np.float64))
            np.testing.assert_allclose(by_row[b], want, rtol=1e-4, atol=1e-3)


def test_nothing_selected_gives_the_neutral_value():
    x, mask = np.full(4, np.nan, np.float32), np.zeros(4, bool)
    assert masked.masked_sum(x, mask) == 0
    assert masked.masked_mean(x, mask) == 0
    assert masked.masked_std(x, mask) == 0
    assert masked.masked_max(x, mask) == -np.inf


def test_the_spread_survives_a_large_mean():
    x = 1e4 + np.array([-0.5, 0.5, -0.5, 0.5], np.float32)
    assert masked.masked_std(x, np.ones(4)) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["masked_sum", "masked_mean", "masked_std"])
def test_gradients_stay_finite_beside_bad_padding(name):
    x = np.array([1.0, 1.0, np.nan], np.float32)
    gradient = jax.grad(lambda x: getattr(masked, name)(x, np.array([1, 1, 0])))(x)
    assert np.all(np.isfinite(gradient))
    assert gradient[2] == 0
