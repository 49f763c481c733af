"""What is trained of a model, what rests, and that nothing is there twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxconv.models.heads import ActorCritic
from jaxconv.models.lora import Adapter, LoraConfig
from jaxconv.objectives.metrics import Metrics
from jaxconv.train.mesh import data_mesh, replicate
from jaxconv.train.sections import shared_sections
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import join, lora_config, merged, split
from jaxconv.train.update import make_update

LORA = LoraConfig(2, 4.0, ("q_proj", "o_proj", "down_proj"))
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 10)).astype("i4")


@pytest.fixture(params=["decoder", "actor-critic"])
def model(request, small_actor_critic):
    whole = small_actor_critic()
    return whole.decoder if request.param == "decoder" else whole


def decoder_of(model):
    return model.decoder if isinstance(model, ActorCritic) else model


@jax.jit
def outputs(model):
    """Logits, and values where there is a head."""
    hidden = decoder_of(model)(TOKENS)
    head = [model.value_head(hidden)] if isinstance(model, ActorCritic) else []
    return [decoder_of(model).logits(hidden), *head]


def shaken(tree):
    """The same with all weights moved: a fresh adapter would change nothing."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f4"), tree)


def buffers(tree) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def test_without_an_adapter_all_is_trained_and_nothing_copied(model):
    trained, resting = split(model, None, jax.random.key(0))
    assert trained is model and resting is None
    assert buffers(join(trained, resting)) == buffers(model)
    assert buffers(merged(trained, resting)) == buffers(model)


def test_an_adapter_refers_to_its_base(model):
    before = buffers(decoder_of(model))
    trained, resting = split(model, LORA, jax.random.key(0))
    assert resting is decoder_of(model) and isinstance(decoder_of(trained), Adapter)
    # As a stage lays them out on its device.
    trained, resting = replicate((trained, resting), data_mesh(1))
    joined = decoder_of(join(trained, resting))
    assert buffers(joined.base) == buffers(resting) == before
    assert buffers(joined.adapter) == buffers(decoder_of(trained))
    if isinstance(model, ActorCritic):
        assert buffers(trained.value_head) == buffers(model.value_head)
    # Merging makes new weights of the targets and of nothing else.
    pairs = zip(buffers(decoder_of(merged(trained, resting))), before, strict=True)
    assert sum(new != old for new, old in pairs) == len(LORA.targets)


def test_a_fresh_adapter_is_its_base_and_a_trained_one_its_merger(model):
    trained, resting = split(model, LORA, jax.random.key(0))
    for fresh, base in zip(outputs(join(trained, resting)), outputs(model), strict=True):
        np.testing.assert_array_equal(fresh, base)
    trained = shaken(trained)
    apart, one = outputs(join(trained, resting)), outputs(merged(trained, resting))
    for x, y, base in zip(apart, one, outputs(model), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
        assert np.abs(x - base).max() > 0.01
    # The base by itself is the reference still.
    np.testing.assert_array_equal(outputs(resting)[0], outputs(decoder_of(model))[0])


def test_an_adapter_is_as_the_config_says():
    config = ConfigDict()
    shared_sections(config)
    assert lora_config(config) is None
    config.lora.update({"rank": 8, "alpha": 2.0, "targets": ("q_proj",), "rslora": True})
    lora = lora_config(config)
    assert (lora.rank, lora.alpha, lora.targets, lora.dropout) == (8, 2.0, ("q_proj",), 0.0)
    assert lora.scale == pytest.approx(2.0 / 8**0.5)


def test_adapters_differ_by_key(model):
    one, other, again = (
        decoder_of(split(model, LORA, jax.random.key(seed))[0]).q_proj.a[...] for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).all()


def test_an_update_moves_the_adapter_and_leaves_the_base(model):
    """Gradient, optimizer state and average are as large as what is trained."""
    optimizer, mesh = optax.adam(0.1), data_mesh(1)
    trained, resting = replicate(split(model, LORA, jax.random.key(0)), mesh)
    trained, base = shaken(trained), jax.device_get(resting)
    before = jax.device_get(trained)

    def loss(trained, tokens, resting):
        whole = join(trained, resting)
        hidden = decoder_of(whole)(tokens)
        total = jnp.square(decoder_of(whole).logits(hidden)).sum()
        if isinstance(whole, ActorCritic):
            total += whole.value_head(hidden).sum()
        return total, jnp.float32(1), Metrics({})

    state = replicate(TrainState.create(trained, optimizer, ema=True), mesh)
    sizes = [x.shape for x in jax.tree.leaves(trained)]
    for part in (optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        assert [x.shape for x in jax.tree.leaves(part)] == sizes
    assert len(jax.tree.leaves(state)) == 4 * len(sizes) + 1  # with the count of updates
    state, updated = make_update(loss, optimizer, mesh)(
        state, replicate(TOKENS[None], mesh), replicate(np.int32(1), mesh), resting
    )
    # Gradients, the norm by the largest of them, weights, two moments and the average.
    assert updated.finite.shape == (6 * len(sizes),)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resting), base)
    for new, old in zip(jax.tree.leaves(state.model), jax.tree.leaves(before), strict=True):
        assert (np.asarray(new) != old).all()
