"""Imitation in updates: cut into micro-batches, averaged, named, and spread over devices.

Run as a program it prints what updates on 1, 2 and 8 devices come to; it needs 8 of them.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.data.batches import Assembler, Share
from jaxconv.data.loader import Loader
from jaxconv.data.plan import plan
from jaxconv.data.token_store import TokenStore
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.lora import LoraConfig
from jaxconv.models.weights import named_weights
from jaxconv.objectives.sft import finish_metrics
from jaxconv.train.likelihood import sft_objective
from jaxconv.train.memory import plan_memory
from jaxconv.train.mesh import data_mesh, replicate, share_rows
from jaxconv.train.state import TrainState
from jaxconv.train.supervised import Supervised
from jaxconv.train.trainable import split
from jaxconv.train.update import make_update, tensor_names

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=40,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_positions=64,
    tie_embeddings=True,
)
LORA = LoraConfig(2, 4.0, ("q_proj", "v_proj", "down_proj"), dropout=0.5)
ROWS, WIDTH = 8, 16
RATE = 0.5
SGD = optax.sgd(RATE)  # Adam would make large differences of rounding errors


def parts(lora: LoraConfig | None):
    """(trained, resting) of a small decoder; an adapter's B is not zero."""
    trained, resting = split(
        jax.jit(Decoder, static_argnums=0)(CONFIG, jax.random.key(0)), lora, jax.random.key(1)
    )
    rng = np.random.default_rng(1)
    if lora:
        trained = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), trained)
    return trained, resting


def store() -> TokenStore:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, WIDTH + 1, 60)
    tokens = rng.integers(0, 40, lengths.sum()).astype("i4")
    mask = rng.random(len(tokens)) < 0.6
    return TokenStore(tokens, mask, np.cumsum([0, *lengths]), np.arange(60), 1, {})


def loader(microbatches: int = 1, updates: int = 3) -> Loader:
    """The same rows, however they are cut."""
    some = store()
    placements = plan(some.lengths, rows=ROWS, width=WIDTH, seed=0, steps=updates)
    return Loader(placements, Assembler(some, Share(ROWS // microbatches), seed=0))


def train(lora, microbatches: int, *, updates: int = 3, ema: bool = False):
    """(states after every update, what each said) on one device."""
    mesh = data_mesh(1)
    trained, resting = replicate(parts(lora), mesh)
    state = TrainState.create(trained, SGD, ema=ema)
    update = make_update(sft_objective, SGD, mesh, ema_decay=0.75)
    states, said = [jax.device_get(state)], []
    with loader(microbatches, updates) as batches:
        for batch in batches:
            state, updated = update(state, batch.batch, np.int32(batch.count), resting)
            states.append(jax.device_get(state))
            said.append(jax.device_get(updated))
    return states, said


def assert_same(one, other, rtol=1e-6):
    """Equal to so many digits of the largest number of each tensor."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(x).max(), 1.0))


# ---------------------------------------------------------------- micro-batches


@pytest.fixture(scope="module", params=["whole", "adapter with dropout"])
def uncut(request):
    lora = None if request.param == "whole" else LORA
    return lora, *train(lora, 1)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_micro_batches_add_up(uncut, microbatches):
    lora, states, said = uncut
    assert not np.allclose(
        jax.tree.leaves(states[0].model)[0], jax.tree.leaves(states[-1].model)[0], atol=1e-3
    )
    found, told = train(lora, microbatches)
    for one, other in zip(states, found, strict=True):
        assert_same(one, other)
    for one, other in zip(said, told, strict=True):
        assert one.denominator == other.denominator
        np.testing.assert_allclose(one.metrics.sums["nll"], other.metrics.sums["nll"], rtol=1e-6)


# ---------------------------------------------------------------- average


def test_the_average_moves_by_a_share_of_the_way():
    states, _ = train(None, 1, ema=True)
    expected = states[0].model
    for state in states:
        expected = jax.tree.map(lambda e, w: 0.75 * e + 0.25 * w, expected, state.model)
        assert_same(expected, state.ema)
        assert state.averaged is state.ema


def test_without_an_average_the_weights_are_what_is_evaluated():
    state = TrainState.create({"w": jnp.ones(3)}, SGD)
    assert state.ema is None and state.averaged is state.model


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapter"])
def test_every_tensor_is_called_by_its_name(lora):
    """One tensor after the other is spoilt on its way from the loss to the weights."""
    mesh = data_mesh(1)
    trained, resting = parts(lora)
    weights = [name.replace(".", "/") for name, _ in named_weights(trained)]

    def scale(tree, resting, factors):
        leaves = [x * factor for x, factor in zip(jax.tree.leaves(tree), factors, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    update = make_update(lambda m, b, r, _: sft_objective(m, b, r), SGD, mesh, scale)
    state = jax.device_get(TrainState.create(trained, SGD))
    with loader() as batches:
        batch = next(batches).batch
    for i, weight in enumerate(weights):
        factors = np.where(np.arange(len(weights)) == i, np.nan, 1.0).astype("f4")
        _, updated = update(state, batch, np.int32(1), resting, factors)
        names = tensor_names(updated.metrics, state)
        assert len(names) == len(updated.finite) == 2 + 3 * len(weights)
        assert names[:2] == ["the sum of nll", "the sum of entropy"]
        bad = [names[at] for at in np.flatnonzero(~np.asarray(updated.finite))]
        assert bad == [f"the gradient of {weight}", f"the weight {weight}"]


# ---------------------------------------------------------------- the work of a stage


def make_work(batches: Loader, update, resting=None, evaluate=lambda trained: {"nll": 1.0}):
    return Supervised(
        update,
        finish_metrics,
        batches,
        data_mesh(1),
        constants=(resting,),
        evaluate=evaluate,
        evaluated=1000,
        flops=lambda lengths: 10.0 * lengths.sum(),
        rates=np.array([0.1, 0.2, 0.3, 0.4], np.float32),
    )


@pytest.fixture(scope="module")
def update():
    return make_update(sft_objective, SGD, data_mesh(1), ema_decay=0.75)


def test_a_step_says_what_it_did(update, capsys):
    """And copies nothing that it was not asked to."""
    _, said = train(None, 2, updates=2)
    placements = plan(store().lengths, rows=ROWS, width=WIDTH, seed=0, steps=2)
    with loader(2, 2) as batches:
        work = make_work(batches, update)
        state = replicate(TrainState.create(parts(None)[0], SGD), data_mesh(1))
        for done, (placement, updated) in enumerate(zip(placements, said, strict=True)):
            with jax.transfer_guard("disallow"):
                state, pending = work.step(state, done, save=None)
            tokens = placement.packing.length.sum()
            assert pending.tokens == pending.metrics["tokens"] == tokens
            assert pending.metrics["fill"] == tokens / (ROWS * WIDTH)
            assert pending.metrics["learning_rate"] == np.float32([0.1, 0.2])[done]
            nll = float(updated.metrics.sums["nll"] / updated.denominator)
            np.testing.assert_allclose(pending.metrics["nll"], nll, rtol=1e-5)
            np.testing.assert_allclose(pending.metrics["perplexity"], np.exp(nll), rtol=1e-4)
            norm = updated.metrics.maxima["gradient_norm"]
            np.testing.assert_allclose(pending.metrics["gradient_norm"], norm, rtol=1e-5)
            assert len(pending.names) == len(pending.finite)
    assert capsys.readouterr().out.count("an update takes") == 1


def test_a_step_goes_on_where_the_snapshot_was(update):
    start = jax.device_get(TrainState.create(parts(None)[0], SGD))

    def go(work, state, steps):
        for done in steps:
            state, _ = work.step(replicate(state, data_mesh(1)), done, save=None)
        return jax.device_get(state)

    with loader(2) as batches:
        work = make_work(batches, update)
        middle = go(work, start, range(1))
        arrays, host = work.snapshot()
        assert arrays == {} == work.like(host)
        end = go(work, middle, range(1, 3))
    with loader(2) as batches:
        work = make_work(batches, update)
        work.restore({}, json.loads(json.dumps(host)))
        again = go(work, middle, range(1, 3))
    jax.tree.map(np.testing.assert_array_equal, end, again)


def test_the_average_is_what_is_evaluated(update):
    state = TrainState({"w": 1.0}, (), {"w": 2.0})
    with loader() as batches:
        work = make_work(batches, update, evaluate=lambda model: {"nll": model["w"]})
        found = work.evaluate(state)
        assert found["held_out/nll"] == 2.0
        assert found.keys() == {"held_out/nll", "speed/evaluated_tokens_per_s"}
        assert work.verdict(3, {"nll": 99.0}) is None


# ---------------------------------------------------------------- devices


def main() -> None:
    """Prints, by number of devices, weights after three updates of an adapter with dropout."""
    out = {}
    for devices in (1, 2, 8):
        mesh = data_mesh(devices)
        assert mesh.size == devices
        trained, resting = replicate(parts(LORA), mesh)
        state = replicate(TrainState.create(trained, SGD), mesh)
        update = make_update(sft_objective, SGD, mesh)
        with loader() as batches:
            for batch in batches:
                shared = share_rows(batch.batch, mesh)
                arguments = state, shared, replicate(np.int32(batch.count), mesh), resting
                memory = plan_memory(update, *arguments)
                state, updated = update(*arguments)
        out[devices] = {
            "weights": [x.tolist() for x in map(np.asarray, jax.tree.leaves(state.model))],
            "denominator": float(updated.denominator),
            "nll": float(updated.metrics.sums["nll"]),
            "memory": [memory.trained, memory.resting, memory.batch],
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
def test_any_number_of_devices_learns_the_same(on_devices, devices):
    one, many = on_devices["1"], on_devices[devices]
    assert many["denominator"] == one["denominator"]
    np.testing.assert_allclose(many["nll"], one["nll"], rtol=1e-6)
    assert_same(*([np.array(w) for w in found["weights"]] for found in (one, many)))


@pytest.mark.parametrize("devices", [2, 8])
def test_each_device_holds_all_weights_and_its_share_of_the_rows(on_devices, devices):
    trained, resting, batch = on_devices["1"]["memory"]
    assert on_devices[str(devices)]["memory"] == [trained, resting, batch // devices]


def test_one_device_of_many_does_what_a_single_one_does(on_devices):
    states, _ = train(LORA, 1)
    found = [np.array(w) for w in on_devices["1"]["weights"]]
    assert_same(jax.tree.leaves(states[-1].model), found)


if __name__ == "__main__":
    main()
