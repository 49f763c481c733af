"""The PPO loss against numbers worked out by hand, a numpy formula, and itself cut into pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.objectives.ppo import PPOBatch, PPOCoefficients, finish_metrics, ppo_loss

POLICY_ONLY = PPOCoefficients(clip_low=0.2, clip_high=0.28, value_coef=0.0)


def rollout(seed, shape=(4, 6)):
    """(logprob, entropy, value, batch) with NaN in every array off the mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.7
    mask[0, 0] = True

    def draw(scale=1.0, shift=0.0):
        return jnp.asarray(
            np.where(mask, shift + scale * rng.normal(size=shape), np.nan), jnp.float32
        )

    old = draw(0.5, -2.0)
    batch = PPOBatch(
        old_logprob=old,
        ref_logprob=draw(0.5, -2.0),
        advantage=draw(),
        value_target=draw(),
        old_value=draw(),
        is_weight=jnp.abs(draw()),
        mask=jnp.asarray(mask),
    )
    return old + draw(0.4), jnp.abs(draw()), draw(), batch


def one_token(ratio, advantage, weight=1.0, *, coefficients=POLICY_ONLY, **value):
    """Loss and gradient in log p of a single token, and the finished metrics."""
    value = {"value": 0.0, "old_value": 0.0, "target": 0.0} | value
    batch = PPOBatch(
        old_logprob=jnp.array([-1.0]),
        ref_logprob=None,
        advantage=jnp.array([advantage]),
        value_target=jnp.array([value["target"]]),
        old_value=jnp.array([value["old_value"]]),
        is_weight=jnp.array([weight]),
        mask=jnp.array([True]),
    )

    def loss(logprob, v):
        total, count, metrics = ppo_loss(logprob, jnp.zeros(1), v, batch, coefficients=coefficients)
        return total, (count, metrics)

    (total, (count, metrics)), (by_logprob, by_value) = jax.value_and_grad(
        loss, (0, 1), has_aux=True
    )(jnp.array([-1.0 + np.log(ratio)], jnp.float32), jnp.array([value["value"]]))
    return float(total), float(by_logprob[0]), float(by_value[0]), finish_metrics(metrics, count)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),  # inside the higher upper clip
        (1.5, 2.0, -2.56, 0.0),  # held at 1.28
        (0.5, 2.0, -1.0, -1.0),  # a good token that became unlikely is pulled back
        (0.5, -2.0, 1.6, 0.0),  # held at 0.8
        (0.9, -2.0, 1.8, 1.8),
        (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely is pushed down
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, slope):
    got, by_logprob, _, metrics = one_token(ratio, advantage)
    assert got == pytest.approx(loss, rel=1e-5)
    assert by_logprob == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert metrics["policy/clip_fraction_high"] == float(ratio == 1.5 and advantage > 0)
    assert metrics["policy/clip_fraction_low"] == float(ratio == 0.5 and advantage < 0)
    assert metrics["policy/ratio_max"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [(2.0, -1.0, 2.0, 2.0), (5.0, -1.0, 3.0, 0.0), (5.0, 1.0, -1.28, 0.0), (0.5, 1.0, -0.5, -0.5)],
)
def test_the_dual_clip_bounds_bad_tokens_only(ratio, advantage, loss, slope):
    coefficients = dataclasses.replace(POLICY_ONLY, dual_clip=3.0)
    got, by_logprob, _, _ = one_token(ratio, advantage, coefficients=coefficients)
    assert got == pytest.approx(loss, rel=1e-5)
    assert by_logprob == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_the_importance_weight_scales_the_policy_term_only():
    coefficients = dataclasses.replace(POLICY_ONLY, value_coef=1.0)
    got, by_logprob, by_value, _ = one_token(
        1.0, 2.0, weight=0.5, coefficients=coefficients, value=1.0, old_value=1.0, target=3.0
    )
    assert got == pytest.approx(-1.0 + 2.0)
    assert by_logprob == pytest.approx(-1.0)
    assert by_value == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope", "clipped"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # within δ = 0.2
        (1.5, 1.0, 2.0, 0.32, 0.0, 1),  # ran ahead: held at 1.2, ½·0.8²
        (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # ran away: the larger loss is the unclipped one
        (2.5, 1.0, 1.1, 0.98, 1.4, 0),
    ],
)
def test_the_value_clip_by_hand(value, old, target, loss, slope, clipped):
    coefficients = PPOCoefficients(value_clip=0.2, value_coef=1.0)
    got, _, by_value, metrics = one_token(
        1.0, 0.0, coefficients=coefficients, value=value, old_value=old, target=target
    )
    assert got == pytest.approx(loss, rel=1e-5)
    assert by_value == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert metrics["critic/clip_fraction"] == clipped
    free = dataclasses.replace(coefficients, value_clip=0.0)
    got, *_ = one_token(1.0, 0.0, coefficients=free, value=value, old_value=old, target=target)
    assert got == pytest.approx(0.5 * (value - target) ** 2, rel=1e-5)


def test_the_whole_loss_equals_the_usual_formula_in_numpy():
    c = PPOCoefficients(value_coef=0.4, entropy_coef=0.01, kl_coef=0.05, value_clip=0.3)
    logprob, entropy, value, batch = rollout(0)
    total, count, _ = ppo_loss(logprob, entropy, value, batch, coefficients=c)
    m = np.asarray(batch.mask)
    x = {
        name: np.asarray(array, np.float64)[m]
        for name, array in [("lp", logprob), ("ent", entropy), ("v", value)]
        + [(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)]
    }
    # as TRL and OpenAI baselines write it: the larger of two losses
    ratio = np.exp(x["lp"] - x["old_logprob"])
    policy = np.maximum(
        -x["advantage"] * ratio, -x["advantage"] * np.clip(ratio, 1 - c.clip_low, 1 + c.clip_high)
    )
    near = np.clip(x["v"], x["old_value"] - c.value_clip, x["old_value"] + c.value_clip)
    critic = 0.5 * np.maximum((x["v"] - x["value_target"]) ** 2, (near - x["value_target"]) ** 2)
    log_r = x["ref_logprob"] - x["lp"]
    k3 = np.exp(log_r) - 1 - log_r
    want = x["is_weight"] * policy + c.value_coef * critic
    want = want - c.entropy_coef * x["ent"] + c.kl_coef * k3
    assert count == m.sum()
    assert float(total) == pytest.approx(want.sum(), rel=1e-5)


def test_micro_batches_add_up_to_the_whole():
    c = PPOCoefficients(entropy_coef=0.01, kl_coef=0.05)
    logprob, entropy, value, batch = rollout(1, (6, 8))

    def loss(inputs, batch):
        total, count, metrics = ppo_loss(*inputs, batch, coefficients=c)
        return total, (count, metrics)

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    inputs = (logprob, entropy, value)
    (whole, (count, metrics)), whole_gradient = grad(inputs, batch)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]  # unequal on purpose
    totals, counts, gradients, merged = [], [], [], None
    for part in parts:
        (t, (n, m)), g = grad(*jax.tree.map(lambda x, p=part: x[p], (inputs, batch)))
        totals.append(t)
        counts.append(n)
        gradients.append(g)
        merged = m if merged is None else merged.merge(m)
    assert sum(counts) == count
    assert float(sum(totals) / sum(counts)) == pytest.approx(float(whole / count), rel=1e-5)
    for k in range(3):
        np.testing.assert_allclose(
            np.concatenate([g[k] for g in gradients]), whole_gradient[k], rtol=1e-6
        )
    want, got = finish_metrics(metrics, count), finish_metrics(merged, sum(counts))
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_metrics_stacked_by_a_scan_reduce_to_the_whole():
    c = PPOCoefficients(kl_coef=0.05)
    logprob, entropy, value, batch = rollout(2, (6, 8))
    _, count, metrics = ppo_loss(logprob, entropy, value, batch, coefficients=c)

    def step(carry, x):
        inputs, part = x
        total, n, m = ppo_loss(*inputs, part, coefficients=c)
        return (carry[0] + total, carry[1] + n), m

    parts = jax.tree.map(lambda x: x.reshape(3, 2, 8), ((logprob, entropy, value), batch))
    (_, scanned), stacked = jax.jit(lambda p: jax.lax.scan(step, (0.0, 0.0), p))(parts)
    want, got = finish_metrics(metrics, count), finish_metrics(stacked.reduce(), scanned)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_metrics_equal_their_definitions():
    logprob, entropy, value, batch = rollout(3, (8, 16))
    _, count, metrics = ppo_loss(logprob, entropy, value, batch, coefficients=POLICY_ONLY)
    got = finish_metrics(metrics, count)
    m = np.asarray(batch.mask)
    ratio = np.exp(np.asarray(logprob - batch.old_logprob)[m])
    target, old_value = np.asarray(batch.value_target)[m], np.asarray(batch.old_value)[m]
    assert got["policy/ratio_mean"] == pytest.approx(ratio.mean(), rel=1e-5)
    assert got["policy/ratio_max"] == pytest.approx(ratio.max(), rel=1e-5)
    assert got["policy/kl_old"] == pytest.approx((ratio - 1 - np.log(ratio)).mean(), rel=1e-4)
    assert got["policy/entropy"] == pytest.approx(np.asarray(entropy)[m].mean(), rel=1e-5)
    log_r = np.asarray(batch.ref_logprob - logprob)[m]
    assert got["policy/kl_ref"] == pytest.approx((np.exp(log_r) - 1 - log_r).mean(), rel=1e-4)
    assert got["critic/target_mean"] == pytest.approx(target.mean(), rel=1e-4, abs=1e-6)
    assert got["critic/target_std"] == pytest.approx(target.std(), rel=1e-4)
    explained = 1 - (target - old_value).var() / target.var()
    assert got["critic/explained_variance"] == pytest.approx(explained, rel=1e-3)


def test_no_gradient_reaches_the_rollout():
    c = PPOCoefficients(entropy_coef=0.01, kl_coef=0.05, dual_clip=3.0)
    logprob, entropy, value, batch = rollout(4)
    batch = dataclasses.replace(batch, mask=batch.mask.astype(jnp.float32))
    gradient = jax.grad(lambda b: ppo_loss(logprob, entropy, value, b, coefficients=c)[0])(batch)
    for field in dataclasses.fields(gradient):
        np.testing.assert_array_equal(getattr(gradient, field.name), 0.0, err_msg=field.name)


def test_nothing_off_the_mask_gets_gradient_or_gives_nan():
    c = PPOCoefficients(entropy_coef=0.01, kl_coef=0.05, dual_clip=3.0)
    *inputs, batch = rollout(5)
    gradients = jax.grad(
        lambda inputs: ppo_loss(*inputs, batch, coefficients=c)[0], allow_int=False
    )(inputs)
    off = ~np.asarray(batch.mask)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[off], 0.0)
        assert np.any(np.asarray(gradient)[~off] != 0)


def test_a_batch_without_tokens_adds_nothing():
    *inputs, batch = rollout(6)
    empty = dataclasses.replace(batch, mask=jnp.zeros_like(batch.mask))
    total, count, metrics = ppo_loss(*inputs, empty, coefficients=POLICY_ONLY)
    assert total == 0 and count == 0
    whole = ppo_loss(*inputs, batch, coefficients=POLICY_ONLY)[2]
    for a, b in zip(jax.tree.leaves(whole.merge(metrics)), jax.tree.leaves(whole), strict=True):
        assert a == b


def test_bfloat16_inputs_are_summed_in_float32():
    *inputs, batch = rollout(7)
    low = [x.astype(jnp.bfloat16) for x in inputs]
    total, count, metrics = ppo_loss(*low, batch, coefficients=POLICY_ONLY)
    assert all(x.dtype == jnp.float32 for x in (total, count, *jax.tree.leaves(metrics)))


def test_a_kl_without_a_reference_is_refused():
    *inputs, batch = rollout(8)
    batch = dataclasses.replace(batch, ref_logprob=None)
    with pytest.raises(ValueError, match=r"kl_coef is 0\.1 but the batch has no ref_logprob"):
        ppo_loss(*inputs, batch, coefficients=PPOCoefficients(kl_coef=0.1))
    _, count, metrics = ppo_loss(*inputs, batch, coefficients=PPOCoefficients())
    assert "policy/kl_ref" not in finish_metrics(metrics, count)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_low", 1.0),
        ("clip_low", 0.0),
        ("clip_high", -0.1),
        ("value_clip", -0.1),
        ("dual_clip", 1.0),
        ("entropy_coef", -1.0),
        ("kl_coef", float("nan")),
    ],
)
def test_coefficients_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        PPOCoefficients(**{field: value})
