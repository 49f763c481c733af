"""An optimizer step does not depend on how its batch was cut into micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.objectives.metrics import Metrics
from jaxconv.train.mesh import data_mesh
from jaxconv.train.optimizer import make_optimizer
from jaxconv.train.state import TrainState
from jaxconv.train.update import accumulate, make_update


def squared_error(model, batch, factor=1.0):
    """A regression whose micro-batches count different numbers of targets."""
    x, y, mask = batch
    error = jnp.where(mask, (x @ model["w"] - y) ** 2, 0.0) * factor
    largest = jnp.where(mask, jnp.abs(x @ model["w"] - y), -jnp.inf).max()
    total = error.sum()
    return total, mask.sum().astype(jnp.float32), Metrics({"mse": total}, {"largest": largest})


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 3)), rng.normal(size=24)
    mask = np.arange(24) % 5 < np.arange(24) / 8
    model = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    return model, tuple(jnp.asarray(a, b) for a, b in ((x, "f4"), (y, "f4"), (mask, bool)))


def split(batch, parts):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 24])
def test_the_sum_over_micro_batches_is_the_whole(problem, parts):
    model, batch = problem
    gradients, denominator, metrics = accumulate(squared_error, model, split(batch, parts), parts)
    whole = jax.grad(lambda m: squared_error(m, batch)[0])(model)
    _, count, expected = squared_error(model, batch)
    np.testing.assert_allclose(gradients["w"], whole["w"], rtol=1e-5)
    assert denominator == count
    np.testing.assert_allclose(metrics.sums["mse"], expected.sums["mse"], rtol=1e-5)
    assert metrics.maxima["largest"] == expected.maxima["largest"]


def test_micro_batches_behind_the_count_are_not_read(problem):
    model, batch = problem
    parts = split(batch, 4)
    poisoned = (parts[0].at[2:].set(jnp.nan), *parts[1:])
    gradients, denominator, metrics = accumulate(squared_error, model, poisoned, 2)
    half = jax.tree.map(lambda x: x[:12], batch)
    expected = jax.grad(lambda m: squared_error(m, half)[0])(model)
    np.testing.assert_allclose(gradients["w"], expected["w"], rtol=1e-5)
    assert denominator == half[2].sum()
    assert np.isfinite(metrics.maxima["largest"])


def test_an_update_divides_by_the_whole_batch_and_reports_the_norm(problem):
    model, batch = problem
    before = np.array(model["w"])
    optimizer = optax.sgd(0.1)
    update = make_update(squared_error, optimizer, data_mesh(1))
    state, denominator, metrics = update(
        TrainState.create(model, optimizer), split(batch, 3), np.int32(3), np.float32(1.0)
    )
    x, y, mask = map(np.asarray, batch)
    mean = 2 * ((x @ before - y) * mask) @ x / mask.sum()
    np.testing.assert_allclose(state.model["w"], before - 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(metrics.maxima["gradient_norm"], np.linalg.norm(mean), rtol=1e-5)
    assert denominator == mask.sum()


def test_a_batch_that_counts_nothing_changes_nothing(problem):
    model, (x, y, mask) = problem
    optimizer = optax.sgd(0.1)
    before = np.array(model["w"])
    nothing = split((x, y, jnp.zeros_like(mask)), 2)
    update = make_update(squared_error, optimizer, data_mesh(1))
    state, denominator, _ = update(
        TrainState.create(model, optimizer), nothing, np.int32(2), np.float32(1.0)
    )
    assert denominator == 0
    np.testing.assert_array_equal(state.model["w"], before)


def test_scaled_gradients_move_what_is_left(problem):
    model, batch = problem
    optimizer = optax.sgd(0.1)
    before = np.array(model["w"])
    update = make_update(
        squared_error, optimizer, data_mesh(1), lambda g, keep: jax.tree.map(lambda x: x * keep, g)
    )
    state, _, metrics = update(
        TrainState.create(model, optimizer), split(batch, 2), np.int32(2), np.float32(0.0)
    )
    np.testing.assert_array_equal(state.model["w"], before)
    assert metrics.maxima["gradient_norm"] == 0


def test_weight_decay_touches_matrices_alone():
    optimizer = make_optimizer(
        learning_rate=0.1,
        schedule="constant",
        steps=10,
        warmup=0,
        b2=0.99,
        weight_decay=0.5,
        clip_norm=1.0,
    )
    model = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(3)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    assert not updates["vector"].any()
