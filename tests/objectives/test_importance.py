"""Truncated importance weights and the two KL estimators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.objectives import kl
from jaxconv.objectives.importance import truncated_importance_weights


def test_weights_by_hand():
    train = np.log(np.array([0.5, 0.9, 0.2, 0.5], np.float32))
    behaviour = np.log(np.array([0.5, 0.3, 0.4, np.nan], np.float32))
    weights, metrics = truncated_importance_weights(train, behaviour, np.array([1, 1, 1, 0]))
    np.testing.assert_allclose(weights, [1.0, 2.0, 0.5, 1.0], rtol=1e-6)
    assert metrics["weight_mean"] == pytest.approx(3.5 / 3)
    assert metrics["clipped_fraction"] == pytest.approx(1 / 3)
    assert metrics["ess"] == pytest.approx(3.5**2 / (3 * 5.25))
    assert metrics["abs_logp_max"] == pytest.approx(np.log(3.0), rel=1e-5)
    assert metrics["abs_logp_mean"] == pytest.approx((np.log(3) + np.log(2)) / 3, rel=1e-5)
    assert metrics["kl"] == pytest.approx((2 - np.log(3) - 0.5 + np.log(2)) / 3, rel=1e-4)


def test_agreement_gives_ones_and_a_full_sample():
    x = np.random.default_rng(0).normal(size=(3, 4))
    weights, metrics = truncated_importance_weights(x, x, np.ones((3, 4)))
    np.testing.assert_array_equal(weights, 1.0)
    assert metrics["ess"] == 1.0
    assert metrics["kl"] == 0.0


def test_a_broken_log_prob_stays_finite():
    train, behaviour = np.array([0.0, -1e4]), np.array([-1e4, 0.0])
    weights, metrics = truncated_importance_weights(train, behaviour, np.ones(2))
    np.testing.assert_allclose(weights, [2.0, np.exp(-20.0)], rtol=1e-5)
    assert all(np.isfinite(x) for x in metrics.values())


def test_nothing_selected_is_finite():
    weights, metrics = truncated_importance_weights(np.zeros(2), np.ones(2), np.zeros(2))
    np.testing.assert_array_equal(weights, 1.0)
    assert all(np.isfinite(x) for x in metrics.values())


def test_no_gradient_through_the_weights():
    gradient = jax.grad(
        lambda x: jnp.sum(truncated_importance_weights(x, jnp.zeros(3), jnp.ones(3))[0])
    )(jnp.array([0.1, 0.2, -0.3]))
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match=r"cap is 0\.5"):
        truncated_importance_weights(np.zeros(1), np.zeros(1), np.ones(1), cap=0.5)


def test_both_kl_estimators_have_the_right_mean():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = np.sum(p * np.log(p / q))
    assert p @ np.asarray(kl.k1(np.log(p), np.log(q))) == pytest.approx(exact, rel=1e-5)
    k3 = np.asarray(kl.k3(np.log(p), np.log(q)))
    assert p @ k3 == pytest.approx(exact, rel=1e-5)
    assert np.all(k3 >= 0)


def test_k3_is_exact_for_tiny_differences():
    # (r − 1) − log r ≈ δ²/2; computed as exp(δ) − 1 it would be lost in float32
    assert kl.k3(np.float32(1e-3), np.float32(0.0)) == pytest.approx(0.5e-6, rel=5e-3)


def test_the_place_decides_the_estimator():
    # As a loss over samples of the policy itself, k1 has expected gradient zero, k3 that of the KL
    # at equality and a pull towards the reference elsewhere.
    logits, reference = jnp.array([0.3, -0.2, 0.5]), jnp.log(jnp.array([0.2, 0.2, 0.6]))
    p = jax.nn.softmax(logits)

    def expected(estimator):
        return jax.grad(lambda x: jnp.sum(p * estimator(jax.nn.log_softmax(x), reference)))(logits)

    np.testing.assert_allclose(expected(kl.k1), 0.0, atol=1e-6)
    towards = p - jnp.exp(reference)  # gradient of the cross entropy of the reference
    np.testing.assert_allclose(expected(kl.k3), towards, atol=1e-6)


def test_kl_rewards_are_minus_beta_k1_on_actions_only():
    logprob = np.array([-1.0, -2.0, np.nan], np.float32)
    reference = np.array([-1.5, -1.0, 0.0], np.float32)
    got = kl.kl_token_rewards(logprob, reference, np.array([1, 1, 0]), coefficient=0.1)
    np.testing.assert_allclose(got, [-0.05, 0.1, 0.0], rtol=1e-5)
    assert got.dtype == jnp.float32
