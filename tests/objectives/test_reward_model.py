"""The Bradley-Terry loss: by hand, in pieces, and TRL's reward trainer on the same rewards."""

import functools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.objectives.reward_model import bradley_terry_loss, finish_metrics


def test_by_hand():
    total, denominator, metrics = bradley_terry_loss(
        np.array([1.0, -2.0]), np.array([0.0, -2.0]), center_coefficient=0.5
    )
    expected = np.log1p(np.exp(-1.0)) + np.log(2.0) + 0.5 * (1.0 + 16.0)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    finished = finish_metrics(metrics, denominator)
    assert finished == {
        "loss": pytest.approx(expected / 2),
        "rewards/chosen": -0.5,
        "rewards/rejected": -1.0,
        "rewards/margin": 0.5,
        "rewards/accuracy": 0.75,  # one right, one tie
        "rewards/max": 1.0,
        "rewards/min": -2.0,
        "rewards/std": pytest.approx(np.std([1.0, -2.0, 0.0, -2.0])),
    }


def test_the_margin_moves_the_point_of_indifference():
    margin = np.array([0.7, 2.0])
    total, _, _ = bradley_terry_loss(np.array([1.7, 3.0]), np.array([1.0, 1.0]), margin=margin)
    assert float(total) == pytest.approx(2 * np.log(2), rel=1e-6)


def test_probabilities_of_both_orders_sum_to_one():
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 9))
    for pair in zip(chosen, rejected, strict=True):
        losses = [bradley_terry_loss(*(np.array([r]) for r in p))[0] for p in (pair, pair[::-1])]
        assert sum(np.exp(-x) for x in losses) == pytest.approx(1.0, rel=1e-5)


def test_the_level_is_free_without_centring_and_tied_to_zero_with_it():
    chosen, rejected = np.random.default_rng(1).normal(size=(2, 5))

    def slope(c):
        def shifted(x):
            return bradley_terry_loss(chosen + x, rejected + x, center_coefficient=c)[0]

        return jax.grad(shifted)(0.0)

    assert slope(0.0) == pytest.approx(0.0, abs=1e-6)
    assert slope(0.1) == pytest.approx(0.4 * np.sum(chosen + rejected), rel=1e-4)


def test_pairs_that_are_not_there_and_micro_batches():
    rng = np.random.default_rng(2)
    chosen, rejected, margin = rng.normal(size=(3, 6)).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    spoiled = [np.where(mask, x, np.nan) for x in (chosen, rejected, margin)]

    def loss(pair, margin, mask):
        total, count, metrics = bradley_terry_loss(
            *pair, margin=margin, mask=mask, center_coefficient=0.1
        )
        return total, (count, metrics)

    (total, (count, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.stack(spoiled[:2]), spoiled[2], mask
    )
    kept, _ = loss([chosen[mask], rejected[mask]], margin[mask], np.ones(4))
    np.testing.assert_allclose(total, kept, rtol=1e-6)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[:, ~mask] == 0)
    parts = [
        loss([x[cut] for x in spoiled[:2]], spoiled[2][cut], mask[cut])
        for cut in (slice(0, 2), slice(2, 6))
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], total, rtol=1e-6)
    merged = finish_metrics(parts[0][1][1].merge(parts[1][1][1]), count)
    for name, x in finish_metrics(metrics, count).items():
        np.testing.assert_allclose(merged[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 1e4, -5e4])
def test_the_spread_of_rewards_does_not_depend_on_their_level_nor_on_the_pieces(level):
    """In float32 the square of 1e4 has no digit left for a spread of 1."""
    rng = np.random.default_rng(4)
    pairs = (level + rng.normal(size=(2, 24))).astype(np.float32)
    mask = rng.random(24) < 0.7
    mask[:3] = False
    expected = np.std(pairs[:, mask].astype(np.float64))
    losses = [
        bradley_terry_loss(*pairs[:, cut], mask=mask[cut])
        for cut in (slice(0, 3), slice(3, 5), slice(5, 24))
    ]
    merged = functools.reduce(lambda one, other: one.merge(other), [m for *_, m in losses])
    equal = [bradley_terry_loss(*pairs[:, i : i + 6], mask=mask[i : i + 6]) for i in (0, 6, 12, 18)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[m for *_, m in equal])
    whole = bradley_terry_loss(*pairs, mask=mask)[2]
    for metrics in (whole, merged, stacked.reduce()):
        found = finish_metrics(metrics, mask.sum())["rewards/std"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_nothing_there_is_zero():
    nothing = np.full(3, np.nan)
    total, count, metrics = bradley_terry_loss(nothing, nothing, margin=nothing, mask=np.zeros(3))
    assert total == 0 and count == 0
    assert finish_metrics(metrics, count)["rewards/std"] == 0


def test_no_gradient_through_the_metrics():
    def accuracy(x):
        return bradley_terry_loss(x, jnp.zeros(3))[2].sums["rewards/margin"]

    np.testing.assert_array_equal(jax.grad(accuracy)(jnp.ones(3)), 0.0)


def test_refusals_name_the_value():
    with pytest.raises(ValueError, match=r"center_coefficient is -0\.1"):
        bradley_terry_loss(np.zeros(2), np.zeros(2), center_coefficient=-0.1)
    with pytest.raises(ValueError, match=r"margin has shape \(\)"):
        bradley_terry_loss(np.zeros(2), np.zeros(2), margin=0.5)


@pytest.mark.parity
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_value_and_gradient_equal_trls(with_margin, coefficient):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    RewardTrainer = pytest.importorskip("trl", reason="parity extra is not installed").RewardTrainer
    rng = np.random.default_rng(3)
    rewards_2B, margin = rng.normal(size=(2, 8)), rng.random(8)
    logits = torch.tensor(rewards_2B.reshape(-1, 1), requires_grad=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(16, 1)}
    inputs |= {"margin": torch.tensor(margin)} if with_margin else {}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    theirs.backward()
    logged = {name: x[0] for name, x in trainer._metrics["train"].items()}

    def mean(rewards_2B):
        total, count, metrics = bradley_terry_loss(
            *rewards_2B,
            margin=margin if with_margin else None,
            center_coefficient=coefficient or 0.0,
        )
        return total / count, finish_metrics(metrics, count)

    with jax.enable_x64():
        (value, ours), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(rewards_2B))
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
        np.testing.assert_allclose(gradient.reshape(-1, 1), logits.grad.numpy(), rtol=1e-6)
    for name, peer in (
        ("accuracy", "accuracy"),
        ("margin", "margin"),
        ("max", "max_reward"),
        ("min", "min_reward"),
    ):
        assert float(ours[f"rewards/{name}"]) == pytest.approx(logged[peer], rel=1e-6)
