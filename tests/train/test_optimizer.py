"""What each optimizer does to each kind of weight, and the learning rate of every update."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.lora import LoraConfig
from jaxconv.models.weights import named_weights
from jaxconv.train.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule, rates
from jaxconv.train.trainable import split

# Everything that a decoder may have: biases, norms of heads, an output matrix of its own.
CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=40,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_positions=64,
    tie_embeddings=False,
    attention_bias=True,
    attention_out_bias=True,
    qk_norm=True,
)
MAPS = ("q", "k", "v", "o", "gate", "up", "down")
MATRICES = {"embed", "lm_head", *(f"layers.{name}" for name in MAPS)}
LR = 0.1


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return jax.jit(Decoder, static_argnums=0)(CONFIG, jax.random.key(0))


DECAY = 0.5


def make(kind: str, learning_rate: float = LR):
    return make_optimizer(
        optax.constant_schedule(learning_rate),
        kind=kind,
        b2=0.95,
        weight_decay=DECAY,
        clip_norm=1e6,
    )


def first(optimizer):
    """A jitted (gradients, model) to the first update."""
    return jax.jit(
        lambda gradients, model: optimizer.update(gradients, optimizer.init(model), model)[0]
    )


first_of = functools.cache(lambda kind: first(make(kind)))  # compiled once for all tests
first_of_adam = first(optax.nadam(LR, b2=0.95))


def one_update(update, gradients, model=None) -> dict[str, np.ndarray]:
    """The first update of every weight by its dotted name; a model of zeros does not decay."""
    model = jax.tree.map(jnp.zeros_like, gradients) if model is None else model
    updates = jax.device_get(update(gradients, model))
    return {name: np.asarray(x[...]) for name, x in named_weights(updates)}


def noise(model, seed=0):
    """Gradients of the shape of a model."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 0.0, 5: 1.0, 10: 2.0, 55: 2.0, 100: 2.0, 999: 2.0}),
        ("cosine", {0: 0.0, 5: 1.0, 10: 2.0, 55: 1.1, 100: 0.2, 999: 0.2}),
        ("linear", {0: 0.0, 5: 1.0, 10: 2.0, 55: 1.0, 100: 0.0, 999: 0.0}),
    ],
)
def test_schedules_warm_up_and_decay(kind, expected):
    schedule = make_schedule(2.0, kind=kind, steps=100, warmup=10)
    found = rates(schedule, 1000)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    for step, value in expected.items():
        np.testing.assert_allclose(found[step], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_without_a_warm_up_begin_at_the_peak(kind):
    assert rates(make_schedule(2.0, kind=kind, steps=5, warmup=0), 5)[0] == 2.0


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_stage_shorter_than_its_warm_up_only_rises(kind):
    found = rates(make_schedule(2.0, kind=kind, steps=5, warmup=10), 5)
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.6, 0.8], rtol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(Refused, match="schedule='step'; it may be 'constant', 'cosine', 'linear'"):
        make_schedule(1.0, kind="step", steps=5, warmup=0)
    with pytest.raises(Refused, match="optimizer='sgd'; it may be 'adamw', 'adafactor', 'muon'"):
        make("sgd")


# ---------------------------------------------------------------- all optimizers


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_learns(decoder, kind):
    tokens = np.random.default_rng(0).integers(0, 40, (4, 12))
    optimizer = make(kind, 3e-3)

    def loss(model):
        logits = model.logits(model(tokens))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def train(model):
        def step(carry, _):
            model, state = carry
            value, gradients = jax.value_and_grad(loss)(model)
            updates, state = optimizer.update(gradients, state, model)
            return (optax.apply_updates(model, updates), state), value

        return jax.lax.scan(step, (model, optimizer.init(model)), length=30)[1]

    values = jax.device_get(train(decoder))
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_is_times_the_rate_and_on_matrices_alone(decoder, kind):
    """Norms and biases of stacked layers have the axes of a matrix, and are none."""
    ones = jax.tree.map(jnp.ones_like, decoder)
    updates = one_update(first_of(kind), jax.tree.map(jnp.zeros_like, decoder), ones)
    assert {"layers.bq", "layers.q_norm", "layers.attn_norm", "final_norm"} < set(updates)
    for name, update in updates.items():
        expected = -LR * DECAY if name in MATRICES else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_update_has_the_size_of_the_rate(decoder, kind):
    """So one learning rate does for all of them; Muon's is smaller as AdamW's is later on."""
    for name, update in one_update(first_of(kind), noise(decoder)).items():
        rms = np.sqrt(np.square(update).mean())
        muon = kind == "muon" and name in MATRICES - {"embed", "lm_head"}
        # Muon's singular values are near one, and not all are there in a matrix that is not square.
        low, high = (0.1 * LR, 0.25 * LR) if muon else (0.5 * LR, 2 * LR)
        assert low < rms < high, name


def test_adamw_is_that_of_optax(decoder):
    gradients = noise(decoder)

    def mask(model):
        def decide(path, _):
            return ".".join(key.name for key in path[:-1]) in MATRICES

        return jax.tree.map_with_path(decide, model)

    peer = optax.adamw(LR, b1=0.9, b2=0.95, weight_decay=DECAY, mask=mask)
    ours = one_update(first_of("adamw"), gradients, decoder)
    for name, update in one_update(first(peer), gradients, decoder).items():
        np.testing.assert_allclose(ours[name], update, rtol=1e-6, atol=1e-8, err_msg=name)


def test_gradients_are_clipped_before_anything_else():
    optimizer = make_optimizer(
        optax.constant_schedule(1.0), b2=0.95, weight_decay=0.0, clip_norm=2.0
    )
    model = {"matrix": jnp.ones((3, 4)), "vector": jnp.ones(5)}
    _, state = optimizer.update(noise(model), optimizer.init(model), model)
    moments = jax.tree.leaves(optax.tree.get(state, "mu"))
    norm = math.sqrt(sum(np.square(x).sum() for x in moments))
    np.testing.assert_allclose(norm, (1 - 0.9) * 2.0, rtol=1e-5)


# ---------------------------------------------------------------- muon


def matrices(name: str, x: np.ndarray) -> np.ndarray:
    """[L, inputs, outputs] of a linear map of a layer or of an adapter."""
    inputs = 2 if name in ("layers.o", "o_proj.a") else 1
    return x.reshape(x.shape[0], math.prod(x.shape[1 : 1 + inputs]), -1)


def assert_orthogonal(matrices_LIO):
    for matrix in matrices_LIO:
        scale = 0.2 * math.sqrt(max(matrix.shape)) * LR
        values = np.linalg.svd(matrix / scale, compute_uv=False)
        assert (values > 0.5).all() and (values < 1.3).all(), values


def test_muon_makes_the_matrix_of_every_layer_orthogonal(decoder):
    gradients = noise(decoder)
    updates = one_update(first_of("muon"), gradients)
    for name in MAPS:
        assert_orthogonal(matrices(f"layers.{name}", updates[f"layers.{name}"]))
    # Each layer for itself: the size of another one's gradient does not matter.
    grown = jax.tree.map(lambda x: x, gradients)
    grown.layers = jax.tree.map(lambda x: x.at[1].mul(1000.0), grown.layers)
    grown = one_update(first_of("muon"), grown)
    for name in MAPS:
        np.testing.assert_allclose(
            grown[f"layers.{name}"], updates[f"layers.{name}"], atol=1e-3 * LR
        )


def test_muon_leaves_what_is_no_matrix_of_a_layer_to_adam(decoder):
    gradients = noise(decoder)
    updates = one_update(first_of("muon"), gradients)
    adam = one_update(first_of_adam, gradients)
    rest = set(updates) - {f"layers.{name}" for name in MAPS}
    assert {"embed", "lm_head", "final_norm", "layers.bk", "layers.k_norm"} < rest
    for name in rest:
        np.testing.assert_allclose(updates[name], adam[name], rtol=1e-4, err_msg=name)


def test_muon_takes_both_matrices_of_an_adapter_and_no_value_head(decoder):
    lora = LoraConfig(4, 8.0, ("q_proj", "o_proj", "up_proj"))
    trained, _ = split(ActorCritic(decoder, ValueHead(16)), lora, jax.random.key(1))
    gradients = noise(trained)
    updates = one_update(first_of("muon"), gradients)
    for target in lora.targets:
        for side in ("a", "b"):
            update = updates[f"decoder.{target}.{side}"]
            assert_orthogonal(matrices(f"{target}.{side}", update))
    adam = one_update(first_of_adam, gradients)
    for name in ("value_head.kernel", "value_head.bias"):
        np.testing.assert_allclose(updates[name], adam[name], rtol=1e-4)


# ---------------------------------------------------------------- memory


def numbers(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_the_states_are_as_large_as_promised():
    """Heads are narrow, and the maps to and from them are factored all the same."""
    config = DecoderConfig(
        family="llama",
        vocab_size=1000,
        embed_dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=512,
        max_positions=64,
        tie_embeddings=True,
    )
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    size = {kind: numbers(jax.eval_shape(make(kind).init, model)) for kind in OPTIMIZERS}
    weights = numbers(model)
    assert 2 * weights <= size["adamw"] < 2 * weights + 10
    assert size["adafactor"] < 0.02 * weights
    in_layers = numbers([getattr(model.layers, name) for name in MAPS])
    assert size["muon"] - (2 * weights - in_layers) < 100  # one momentum where Muon is


def test_adafactor_sees_matrices_where_the_weights_have_heads():
    """The same update as that of the plain matrices, layer by layer stacked."""
    config = DecoderConfig(
        family="llama",
        vocab_size=300,
        embed_dim=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=24,
        max_positions=64,
        tie_embeddings=True,
    )
    layers = jax.eval_shape(lambda: Decoder(config, jax.random.key(0))).layers
    gradients = noise({"q": layers.q, "o": layers.o})
    model = jax.tree.map(jnp.zeros_like, gradients)
    optimizer = make("adafactor")
    ours, _ = optimizer.update(gradients, optimizer.init(model), model)

    def plain(weights):
        return {name: matrices(f"layers.{name}", w[...]) for name, w in weights.items()}

    peer = optax.adafactor(LR, multiply_by_parameter_scale=False)
    theirs, _ = peer.update(plain(gradients), peer.init(plain(model)), plain(model))
    for name, update in plain(ours).items():
        np.testing.assert_allclose(update, theirs[name], rtol=1e-5, atol=1e-7)
