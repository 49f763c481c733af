"""Adapters over one base: what they compute, what trains, what is shared, and their dropout."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.hf import load_pretrained, save_pretrained
from jaxconv.models.lora import (
    TARGETS,
    AdaptedDecoder,
    Adapter,
    LoraConfig,
    dropout,
    merge,
    merged_layer,
)
from jaxconv.models.sharding import partition_spec
from jaxconv.models.weights import named_weights

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    max_positions=64,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
)
LORA = LoraConfig(rank=4, alpha=6.0, targets=TARGETS)
DROPPING = replace(LORA, targets=("q_proj", "down_proj"), dropout=0.4)


@pytest.fixture(scope="module")
def base():
    return jax.jit(lambda: Decoder(CONFIG, jax.random.key(0)))()


@partial(jax.jit, static_argnums=(0, 1))
def new_adapter(lora, seed):
    return Adapter(CONFIG, lora, jax.random.key(seed))


def trained_adapter(lora=LORA, seed=1):
    """An adapter away from B = 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: w + 0.1 * jnp.asarray(rng.standard_normal(w.shape, np.float32)),
        new_adapter(lora, seed),
    )


def tokens(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, CONFIG.vocab_size)


def with_config(model, **changes):
    """The same weights under other execution choices."""
    other = jax.eval_shape(lambda: Decoder(replace(CONFIG, **changes), jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@jax.jit
def run(model, tokens_BT, seeds_B=None):
    return model(tokens_BT, dropout_seeds=seeds_B)


def loss(adapter, base, tokens_BT, seeds_B=None):
    model = AdaptedDecoder(base, adapter)
    logp = jax.nn.log_softmax(model.logits(model(tokens_BT, dropout_seeds=seeds_B))[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1))


gradient = jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"rank": True}, "rank is True"),
        ({"alpha": 0.0}, r"alpha is 0.0; it must be positive"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ()}, "targets are empty; they may be q_proj, k_proj"),
        ({"targets": ("q_proj", "lm_head")}, "target is 'lm_head'; it may be q_proj, k_proj"),
        ({"targets": ("q_proj", "q_proj")}, "each may be named once"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(Refused, match=message):
        replace(LORA, **changes)


def test_settings_are_hashable_and_give_the_scale():
    assert hash(LORA) == hash(replace(LORA)) and LORA != DROPPING
    assert LORA.scale == 1.5
    assert replace(LORA, rslora=True).scale == 3.0


def test_first_weights_are_a_linear_maps_and_zero():
    adapter = Adapter(CONFIG, replace(LORA, rank=64), jax.random.key(0))
    fan_in = {"o_proj": 64, "down_proj": 48}
    for target in TARGETS:
        low_rank = getattr(adapter, target)
        bound = fan_in.get(target, 32) ** -0.5
        a = low_rank.a[...]
        assert a.dtype == low_rank.b[...].dtype == jnp.float32
        assert 0.95 * bound < jnp.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert jnp.all(low_rank.b[...] == 0)
        assert jnp.all(a[0] != a[1])  # layers differ
    assert jnp.all(adapter.q_proj.a[...] != adapter.k_proj.a[...])
    alone = Adapter(CONFIG, replace(LORA, rank=64, targets=("k_proj",)), jax.random.key(0))
    np.testing.assert_array_equal(alone.k_proj.a[...], adapter.k_proj.a[...])
    assert not hasattr(alone, "q_proj")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_a_new_adapter_changes_no_bit(base, dtype, stored):
    base = jax.tree.map(lambda w: w.astype(stored), with_config(base, dtype=dtype))
    adapted = AdaptedDecoder(base, new_adapter(LORA, 1))
    batch = tokens(2, 10)
    hidden = run(base, batch)
    assert hidden.dtype == dtype and adapted.config == base.config
    np.testing.assert_array_equal(run(adapted, batch), hidden)
    np.testing.assert_array_equal(adapted.logits(hidden), base.logits(hidden))
    np.testing.assert_array_equal(adapted.head(), base.head())


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_adds_its_scaled_product_to_its_own_weight(base, target):
    adapter = trained_adapter(LoraConfig(rank=3, alpha=2.0, targets=(target,)))
    low_rank, name = getattr(adapter, target), target.removesuffix("_proj")
    a, b = low_rank.a[...].reshape(2, -1, 3), low_rank.b[...].reshape(2, 3, -1)
    w = getattr(base.layers, name)[...]
    merged = merge(AdaptedDecoder(base, adapter))
    expected = w + 2.0 / 3.0 * jnp.einsum("lir,lro->lio", a, b).reshape(w.shape)
    np.testing.assert_allclose(getattr(merged.layers, name)[...], expected, atol=1e-6)
    # What is no target is the base's own array.
    for (path, ours), (_, theirs) in zip(named_weights(merged), named_weights(base), strict=True):
        same = ours[...].unsafe_buffer_pointer() == theirs[...].unsafe_buffer_pointer()
        assert same == (path != f"layers.{name}")


def test_adapted_and_merged_decoders_agree(base):
    adapted, batch = AdaptedDecoder(base, trained_adapter()), tokens(2, 10)
    hidden = run(adapted, batch)
    np.testing.assert_allclose(hidden, run(merge(adapted), batch), atol=2e-5)
    assert jnp.abs(hidden - run(base, batch)).max() > 0.1


def test_merging_gives_a_plain_decoder_of_the_same_kind(base):
    assert merge(base) is base
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
    merged = merge(AdaptedDecoder(half, trained_adapter()))
    assert isinstance(merged, Decoder)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert {w.dtype for w in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    # Summed in float32 and rounded once.
    adapter = trained_adapter()
    w = half.layers.gate[...].astype(jnp.float32)
    products = jnp.einsum("ldr,lrf->ldf", adapter.gate_proj.a[...], adapter.gate_proj.b[...])
    expected = (w + LORA.scale * products).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged.layers.gate[...], expected)


def test_rollout_and_export_see_the_merged_weights(base, tmp_path):
    adapted = AdaptedDecoder(base, trained_adapter())
    merged = merge(adapted)
    for model in (adapted, ActorCritic(adapted, ValueHead(CONFIG.embed_dim, bias=0.5))):
        weights = unstack(model)
        like = unstack(merged)
        for got, wanted in zip(
            jax.tree.leaves((weights.embed, weights.layers, weights.final_norm, weights.head)),
            jax.tree.leaves((like.embed, like.layers, like.final_norm, like.head)),
            strict=True,
        ):
            np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert weights.value_bias == 0.5
    for got, wanted in zip(
        jax.tree.leaves(merged_layer(base, 1)), jax.tree.leaves(base.layers), strict=True
    ):
        np.testing.assert_array_equal(got, wanted[1])
    save_pretrained(adapted, None, tmp_path / "m")
    loaded, _ = load_pretrained(tmp_path / "m")
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_one_merged_layer_costs_one_layer():
    config = replace(CONFIG, num_layers=16)
    base = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    adapter = jax.eval_shape(lambda: Adapter(config, LORA, jax.random.key(0)))
    compiled = jax.jit(merged_layer).lower(AdaptedDecoder(base, adapter), 3).compile()
    memory = compiled.memory_analysis()
    layer_bytes = sum(4 * w.size for w in jax.tree.leaves(base.layers)) / 16
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 3 * layer_bytes


def test_gradients_are_the_chain_rule_over_the_merged_weights(base):
    adapter, batch = trained_adapter(), tokens(2, 10)
    grads = gradient(adapter, base, batch)
    assert isinstance(grads, Adapter)
    merged = jax.jit(jax.grad(merged_loss))(adapter, base, batch)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(merged), strict=True):
        assert jnp.any(got != 0)
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("execution", [{"remat": "dots"}, {"remat": "full", "unroll_layers": True}])
def test_execution_choices_keep_the_gradients_and_masks(base, execution):
    adapter, batch, seeds = trained_adapter(DROPPING), tokens(2, 10), jnp.asarray([5, 6], "uint32")
    plain = gradient(adapter, base, batch, seeds)
    other = gradient(adapter, with_config(base, **execution), batch, seeds)
    for got, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_remat_dots_keeps_no_second_output_of_each_map():
    config = replace(CONFIG, num_layers=8, remat="dots")
    base = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    adapter = jax.eval_shape(lambda: Adapter(config, LORA, jax.random.key(0)))
    batch = jnp.zeros((8, 48), jnp.int32)

    def temporary_bytes(function, *inputs):
        compiled = jax.jit(jax.grad(function)).lower(*inputs, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    adapted = temporary_bytes(lambda a, b, t: jnp.sum(AdaptedDecoder(b, a)(t)), adapter, base)
    plain = temporary_bytes(lambda b, t: jnp.sum(b(t)), base)
    assert adapted < 1.35 * plain


def merged_loss(adapter, base, tokens_BT):
    model = merge(AdaptedDecoder(base, adapter))
    logp = jax.nn.log_softmax(model.logits(model(tokens_BT))[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1))


def test_no_gradient_of_the_base_is_computed(base):
    jaxpr = jax.make_jaxpr(jax.grad(loss))(new_adapter(LORA, 1), base, tokens(2, 10))
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    made = {var.aval.shape for eqn in scans for var in eqn.outvars}
    assert new_adapter(LORA, 1).gate_proj.a.shape in made
    assert not made & {w.shape for w in jax.tree.leaves(base.layers) if w.ndim > 2}


def test_first_gradients_are_those_of_b(base):
    grads = gradient(new_adapter(LORA, 1), base, tokens(2, 10))
    for path, grad in named_weights(grads):
        assert jnp.any(grad[...] != 0) == path.endswith(".b")


def test_bfloat16_compute_keeps_float32_adapters(base):
    adapter = trained_adapter()
    half = with_config(base, dtype="bfloat16")
    hidden = run(AdaptedDecoder(half, adapter), tokens(2, 10))
    exact = run(AdaptedDecoder(base, adapter), tokens(2, 10))
    assert hidden.dtype == jnp.bfloat16
    assert 1e-4 < jnp.abs(hidden - exact).max() < 0.3
    grads = gradient(adapter, half, tokens(2, 10))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_adapters_share_the_base_and_differ(base):
    one, two = (AdaptedDecoder(base, trained_adapter(seed=seed)) for seed in (1, 2))
    for (_, a), (_, b) in zip(named_weights(one.base), named_weights(two.base), strict=True):
        assert a[...].unsafe_buffer_pointer() == b[...].unsafe_buffer_pointer()
    batch = tokens(2, 10)
    before = run(base, batch)
    outputs = [run(one, batch), run(two, batch), before]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert jnp.abs(outputs[i] - outputs[j]).max() > 0.1
    np.testing.assert_array_equal(run(one.base, batch), before)  # the reference model


def test_only_the_adapter_is_optimised_and_it_learns(base):
    transform = optax.adamw(3e-2)
    adapter, batch = new_adapter(LORA, 1), tokens(4, 12)
    state = transform.init(adapter)
    size = sum(w.size for w in jax.tree.leaves(adapter))
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * size + 1  # two moments and a count

    @jax.jit
    def step(adapter, state, base):
        value, grads = jax.value_and_grad(loss)(adapter, base, batch)
        updates, state = transform.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    values = []
    for _ in range(20):
        adapter, state, value = step(adapter, state, base)
        values.append(float(value))
    assert isinstance(adapter, Adapter)
    assert values[-1] < 0.7 * values[0]


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = jnp.full((3, 400, 50), 2.0)
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    got = dropout(x, 0.3, keys, index=0)
    np.testing.assert_allclose(np.unique(got), [0.0, 2.0 / 0.7], rtol=1e-6)
    # Five standard deviations of a mean of 20,000 draws.
    np.testing.assert_allclose(jnp.mean(got == 0, axis=(1, 2)), 0.3, atol=5 * 0.46 / 20_000**0.5)
    other = dropout(x, 0.3, keys, index=1)
    agree = jnp.mean((got == 0) == (other == 0), axis=(1, 2))
    np.testing.assert_allclose(agree, 0.3**2 + 0.7**2, atol=0.02)  # independent
    # Padding a row further moves no mask.
    np.testing.assert_array_equal(dropout(x[:, :123], 0.3, keys, index=0), got[:, :123])


def test_every_layer_and_row_has_its_own_key():
    keys_LB = new_adapter(DROPPING, 1).dropout_keys(jnp.asarray([7, 8, 7], jnp.uint32))
    data = np.asarray(jax.random.key_data(keys_LB))
    assert data.shape[:2] == (2, 3)
    np.testing.assert_array_equal(data[:, 0], data[:, 2])
    assert len({tuple(key) for key in data[:, :2].reshape(4, -1)}) == 4


def test_dropout_needs_seeds_and_a_share(base):
    batch, seeds = tokens(3, 10), jnp.asarray([1, 2, 3], jnp.uint32)
    dropping = AdaptedDecoder(base, trained_adapter(DROPPING))
    plain = AdaptedDecoder(base, trained_adapter(replace(DROPPING, dropout=0.0)))
    np.testing.assert_array_equal(run(dropping, batch), run(plain, batch))
    np.testing.assert_array_equal(run(plain, batch, seeds), run(plain, batch))
    first = run(dropping, batch, seeds)
    np.testing.assert_array_equal(first, run(dropping, batch, seeds))
    other = run(dropping, batch, seeds.at[1].set(9))
    changed = jnp.any(first != other, axis=(1, 2))
    np.testing.assert_array_equal(changed, [False, True, False])
    assert jnp.all(jnp.any(first != run(dropping, batch), axis=(1, 2)))


def test_dropout_does_not_see_how_rows_are_batched(base):
    model = AdaptedDecoder(base, trained_adapter(DROPPING))
    batch, seeds = tokens(4, 10), jnp.asarray([3, 1, 4, 1], jnp.uint32)
    whole = run(model, batch, seeds)
    rows = [run(model, batch[i : i + 1], seeds[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(whole, rows, atol=1e-5)  # dropped entries differ by far more
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(run(model, batch[order], seeds[order]), whole[order], atol=1e-5)
    others = run(model, batch, seeds[order])
    assert np.abs(others - whole).max() > 0.1


def test_adapters_are_split_like_the_weights_beside_them():
    abstract = jax.eval_shape(lambda: new_adapter(LORA, 1))
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 2})
    specs = {name: partition_spec(param, mesh) for name, param in named_weights(abstract)}
    # What has only the width to split is too small to gather.
    assert specs["q_proj.a"] == PartitionSpec(None, None, None)
    assert specs["q_proj.b"] == PartitionSpec(None, None, "tensor", None)
    assert specs["o_proj.a"] == PartitionSpec(None, "tensor", None, None)
    assert specs["o_proj.b"] == PartitionSpec(None, None, None)
    assert specs["down_proj.a"] == PartitionSpec(None, "tensor", None)


PROGRAM = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.lora import AdaptedDecoder, Adapter, LoraConfig
from jaxconv.models.sharding import batch_sharding, device_mesh, shardings

CONFIG, LORA = {config!r}, {lora!r}
mesh = device_mesh(data=2, tensor=2)
base = jax.jit(lambda: Decoder(CONFIG, jax.random.key(0)))()
adapter = jax.jit(lambda: Adapter(CONFIG, LORA, jax.random.key(1)))()
rng = np.random.default_rng(0)
adapter = jax.tree.map(lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32), adapter)
tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, CONFIG.vocab_size)
seeds = jnp.arange(4, dtype=jnp.uint32)

run = jax.jit(lambda model, tokens, seeds: model(tokens, dropout_seeds=seeds))
whole = run(AdaptedDecoder(base, adapter), tokens, seeds)
split = AdaptedDecoder(*(jax.device_put(x, shardings(x, mesh)) for x in (base, adapter)))
assert split.adapter.q_proj.b[...].addressable_shards[0].data.shape == (2, 4, 2, 16)
rows = [jax.device_put(x, batch_sharding(mesh)) for x in (tokens, seeds)]
with jax.set_mesh(mesh):
    np.testing.assert_allclose(run(split, *rows), whole, atol=1e-5)
assert jnp.all(jnp.abs(whole - run(AdaptedDecoder(base, adapter), tokens, seeds + 1)).max(-1) > 0.1)
print("same")
"""


def test_four_devices_drop_what_one_drops():
    program = PROGRAM.format(config=CONFIG, lora=DROPPING)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("same")
