"""An optimizer step does not depend on how its batch was cut into micro-batches, nor on how many
devices share it.

Run as a program it prints what updates on 1, 2 and 8 devices come to; it needs 8 of them.
"""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.objectives.metrics import Metrics, Spread
from jaxconv.train.mesh import DATA, data_mesh, replicate, share_rows
from jaxconv.train.optimizer import make_optimizer
from jaxconv.train.state import TrainState
from jaxconv.train.update import accumulate, make_update, tensor_names


def squared_error(model, batch, factor=1.0):
    """A regression whose micro-batches count different numbers of targets."""
    x, y, mask = batch
    error = jnp.where(mask, (x @ model["w"] - y) ** 2, 0.0) * factor
    largest = jnp.where(mask, jnp.abs(x @ model["w"] - y), -jnp.inf).max()
    total = error.sum()
    spread = Spread.of(1e4 + x @ model["w"], mask)
    metrics = Metrics({"mse": total}, {"largest": largest}, {"std": spread})
    return total, mask.sum().astype(jnp.float32), metrics


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
    x, _, mask = map(np.asarray, batch)
    std = np.std((x @ np.asarray(model["w"]))[mask])
    np.testing.assert_allclose(metrics.spreads["std"].std, std, rtol=1e-3)


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
    state, updated = update(
        TrainState.create(model, optimizer), split(batch, 3), np.int32(3), np.float32(1.0)
    )
    x, y, mask = map(np.asarray, batch)
    mean = 2 * ((x @ before - y) * mask) @ x / mask.sum()
    np.testing.assert_allclose(state.model["w"], before - 0.1 * mean, rtol=1e-5)
    norm = updated.metrics.maxima["gradient_norm"]
    np.testing.assert_allclose(norm, np.linalg.norm(mean), rtol=1e-5)
    assert updated.denominator == mask.sum()


def test_a_batch_that_counts_nothing_changes_nothing(problem):
    model, (x, y, mask) = problem
    optimizer = optax.sgd(0.1)
    before = np.array(model["w"])
    nothing = split((x, y, jnp.zeros_like(mask)), 2)
    update = make_update(squared_error, optimizer, data_mesh(1))
    state, updated = update(
        TrainState.create(model, optimizer), nothing, np.int32(2), np.float32(1.0)
    )
    assert updated.denominator == 0
    np.testing.assert_array_equal(state.model["w"], before)


def test_scaled_gradients_move_what_is_left(problem):
    model, batch = problem
    optimizer = optax.sgd(0.1)
    before = np.array(model["w"])
    update = make_update(
        squared_error, optimizer, data_mesh(1), lambda g, keep: jax.tree.map(lambda x: x * keep, g)
    )
    state, updated = update(
        TrainState.create(model, optimizer), split(batch, 2), np.int32(2), np.float32(0.0)
    )
    np.testing.assert_array_equal(state.model["w"], before)
    assert updated.metrics.maxima["gradient_norm"] == 0


def bad_tensors(optimizer, *, state_of=lambda state: state, scale=1.0, ema_decay=0.0):
    """Names of what is not finite after one update of three weights whose gradients are 1, 3, 2
    times `scale`."""

    def loss(model, batch):
        total = scale * (model["a"] + 3 * model["b"] + 2 * model["c"]).sum()
        return total, jnp.float32(1), Metrics({"loss": total})

    model = {name: jnp.zeros(2) for name in "abc"}
    state = state_of(TrainState.create(model, optimizer, ema=ema_decay > 0))
    update = make_update(loss, optimizer, data_mesh(1), ema_decay=ema_decay)
    state, updated = update(state, np.zeros((1, 1)), np.int32(1))
    names = tensor_names(updated.metrics, state)
    assert len(names) == len(updated.finite)
    bad = [name for name, good in zip(names, updated.finite, strict=True) if not good]
    return bad, updated


def test_a_norm_that_overflows_names_the_largest_gradient():
    """Squares of finite gradients may be infinite; clipping would then stop all learning."""
    optimizer = make_optimizer(
        optax.constant_schedule(0.1), b2=0.99, weight_decay=0.0, clip_norm=1.0
    )
    bad, updated = bad_tensors(optimizer, scale=1e25)
    assert np.isinf(updated.metrics.maxima["gradient_norm"])
    assert bad == ["the gradient norm (largest in b)"]
    assert bad_tensors(optimizer, scale=1e15)[0] == []


def test_a_gradient_that_is_not_finite_is_named_rather_than_the_norm():
    bad, _ = bad_tensors(optax.sgd(0.0), scale=2e38)
    assert bad[:2] == ["the gradient of b", "the gradient of c"]
    assert not any("norm" in name for name in bad)


def test_the_optimizers_state_and_the_average_are_looked_at():
    # The square of this gradient is infinite, and the update by it 0: no weight tells of it.
    bad, _ = bad_tensors(optax.scale_by_adam(), scale=2e19)
    assert set(bad) == {
        "the gradient norm (largest in b)",
        *(f"the optimizer state nu/{name}" for name in "abc"),
    }

    def spoilt(state):
        return TrainState(state.model, state.opt_state, state.ema | {"c": jnp.full(2, jnp.nan)})

    bad, _ = bad_tensors(optax.sgd(0.1), state_of=spoilt, ema_decay=0.5)
    assert bad == ["the average of c"]


def test_weight_decay_touches_matrices_alone():
    optimizer = make_optimizer(
        optax.constant_schedule(0.1), b2=0.99, weight_decay=0.5, clip_norm=1.0
    )
    model = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(3)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    assert not updates["vector"].any()


def summed_in_the_loop(model, batch, factor=1.0):
    """A loss for which the devices wait for each other at every micro-batch."""
    total, count, metrics = squared_error(model, batch, factor)
    return jax.lax.psum(total, DATA) ** 2, count, metrics


_COLLECTIVE = re.compile(
    r" = (.*?) (?:all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)")


def collectives(compiled: str) -> tuple[list[str], list[str]]:
    """Result types of the collectives of an HLO text: (inside loops, all of them)."""
    computations: dict[str, list[str]] = {}
    for line in compiled.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            lines = computations[name] = []
        elif line.startswith(" "):
            lines.append(line)
    waiting = re.findall(r"body=%?([\w.-]+)", compiled)
    assert waiting, "no loop was compiled"
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += _CALLED.findall("\n".join(computations[name]))
    found = [
        (name in inside, kind[1])
        for name, lines in computations.items()
        for kind in map(_COLLECTIVE.search, lines)
        if kind
    ]
    return [kind for looped, kind in found if looped], [kind for _, kind in found]


def main() -> None:
    """Prints, by number of devices, the result of three updates and where devices wait."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 8, 37)).astype("f4"), rng.normal(size=(3, 8)).astype("f4")
    batches = (x, y, rng.random((3, 8)) < 0.6)
    optimizer = optax.adam(0.1)
    constants = (np.int32(3), np.float32(0.5))
    out = {}
    for devices in (1, 2, 8):
        mesh = data_mesh(devices)
        assert mesh.size == devices
        state = replicate(TrainState.create({"w": jnp.ones(37)}, optimizer), mesh)
        shared = share_rows(batches, mesh)
        update = make_update(squared_error, optimizer, mesh)
        waits = collectives(update.lower(state, shared, *constants).compile().as_text())
        slow = make_update(summed_in_the_loop, optimizer, mesh)
        slow_waits = collectives(slow.lower(state, shared, *constants).compile().as_text())
        for _ in range(3):
            state, updated = update(state, shared, *constants)
        out[devices] = {
            "w": state.model["w"].tolist(),
            "denominator": float(updated.denominator),
            "metrics": jax.tree.map(float, updated.metrics.sums | updated.metrics.maxima),
            "std": float(updated.metrics.spreads["std"].std),
            "waits": waits,
            "slow_waits": slow_waits,
        }
    print(json.dumps(out))


@pytest.fixture(scope="module")
def on_devices():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("devices", ["2", "8"])
def test_the_update_is_the_same_on_any_number_of_devices(on_devices, devices):
    one, many = on_devices["1"], on_devices[devices]
    np.testing.assert_allclose(many["w"], one["w"], rtol=1e-6, atol=1e-6)
    assert np.abs(np.array(one["w"]) - 1).min() > 0.01
    assert many["denominator"] == one["denominator"]
    assert many["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        np.testing.assert_allclose(many["metrics"][name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(many["std"], one["std"], rtol=1e-3)


@pytest.mark.parametrize("devices", ["2", "8"])
def test_devices_wait_for_each_other_once_an_update(on_devices, devices):
    in_loops, everywhere = on_devices[devices]["waits"]
    assert in_loops == []
    assert sum("f32[37]" in kind for kind in everywhere) == 1
    assert on_devices[devices]["slow_waits"][0]  # what would be seen otherwise
    assert on_devices["1"]["waits"][0] == []


if __name__ == "__main__":
    main()
