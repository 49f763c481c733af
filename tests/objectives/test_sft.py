"""Supervised loss: sums, global denominators, masks."""

import jax
import numpy as np
import pytest

from jaxconv.objectives.sft import finish_metrics, sft_loss


def test_by_hand():
    logprob = np.log(np.array([[0.5, 0.25, np.nan], [0.125, np.nan, np.nan]], np.float32))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    total, count, metrics = sft_loss(logprob, mask)
    assert float(total) == pytest.approx(6 * np.log(2), rel=1e-6)
    assert count == 3
    finished = finish_metrics(metrics, count)
    assert float(finished["nll"]) == pytest.approx(2 * np.log(2), rel=1e-6)
    assert float(finished["perplexity"]) == pytest.approx(4.0, rel=1e-5)


def test_unequal_micro_batches_add_up():
    rng = np.random.default_rng(0)
    logprob, mask = -rng.random((5, 7)), rng.random((5, 7)) < 0.5
    total, count, metrics = sft_loss(logprob, mask)
    first, second = sft_loss(logprob[:1], mask[:1]), sft_loss(logprob[1:], mask[1:])
    assert float(first[0] + second[0]) == pytest.approx(float(total), rel=1e-6)
    assert first[1] + second[1] == count
    merged = finish_metrics(first[2].merge(second[2]), first[1] + second[1])
    assert float(merged["nll"]) == pytest.approx(float(finish_metrics(metrics, count)["nll"]))


def test_gradient_is_minus_one_on_the_mask_only():
    mask = np.array([True, False, True])
    gradient = jax.grad(lambda x: sft_loss(x, mask)[0])(np.array([-1.0, np.nan, -2.0]))
    np.testing.assert_array_equal(gradient, [-1.0, 0.0, -1.0])
