"""The decoder as a function: causality, packing, precision, rematerialisation, plain transforms."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.models import attention
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder, embed_tokens, rms_norm
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.rope import apply_rope, rope_tables

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=64,
    embed_dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    max_positions=64,
    qk_norm=True,
)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, jax.random.key(0))


def tokens(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, CONFIG.vocab_size)


def with_config(model, **changes):
    """The same weights under other execution choices."""
    other = jax.eval_shape(lambda: Decoder(replace(CONFIG, **changes), jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


def loss(model, tokens_BT):
    logp = jax.nn.log_softmax(model.logits(model(tokens_BT))[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1))


@jax.jit
def run(model, *inputs):
    return model(*inputs)


gradient = jax.jit(jax.grad(loss))


def test_later_tokens_do_not_change_earlier_states(model):
    first = tokens(2, 12)
    second = first.at[:, 7:].set((first[:, 7:] + 1) % CONFIG.vocab_size)
    a, b = run(model, first), run(model, second)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert jnp.all(jnp.any(a[:, 7:] != b[:, 7:], axis=-1))


def test_packed_segments_equal_separate_rows(model):
    one, two = tokens(1, 9, seed=2), tokens(1, 6, seed=3)
    padding = jnp.full((1, 3), 5)
    packed = jnp.concatenate([one, two, padding], axis=1)
    segments = jnp.asarray([[1] * 9 + [2] * 6 + [0] * 3])
    positions = jnp.asarray([[*range(9), *range(6), *range(3)]])
    hidden = run(model, packed, positions, segments)
    np.testing.assert_allclose(hidden[:, :9], run(model, one), atol=2e-5)
    np.testing.assert_allclose(hidden[:, 9:15], run(model, two), atol=2e-5)
    # Rotary positions are relative, so counting along the row says the same.
    np.testing.assert_allclose(
        run(model, packed, None, segments)[:, 9:15], run(model, two), atol=5e-5
    )


def test_blocks_of_queries_in_a_long_row_change_nothing(model):
    long = tokens(1, 70)  # not a multiple of the number of blocks
    short = run(model, long[:, :50])  # one block
    np.testing.assert_allclose(run(model, long)[:, :50], short, atol=2e-5)
    segments = jnp.asarray([[1] * 33 + [2] * 37])
    hidden = run(model, long, None, segments)
    np.testing.assert_allclose(hidden[:, 33:], run(model, long[:, 33:]), atol=5e-5)


WINDOWED = {
    "alternating": replace(
        CONFIG,
        family="gemma3_text",
        sliding_window=5,
        sliding_layers=(True, False, True),
        rope_local_theta=50.0,
    ),
    "every layer": replace(
        CONFIG, family="mistral", qk_norm=False, sliding_window=5, sliding_layers=(True,) * 3
    ),
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_hold_in_packed_and_in_long_rows(kind):
    """Segments are longer than the window, the row has several blocks of queries."""
    model = Decoder(WINDOWED[kind], jax.random.key(0))
    one, two, padding = tokens(1, 33, seed=2), tokens(1, 36, seed=3), jnp.full((1, 11), 5)
    packed = jnp.concatenate([one, two, padding], axis=1)
    segments = jnp.asarray([[1] * 33 + [2] * 36 + [0] * 11])
    positions = jnp.asarray([[*range(33), *range(36), *range(11)]])
    hidden = run(model, packed, positions, segments)
    np.testing.assert_allclose(hidden[:, :33], run(model, one), atol=3e-5)
    np.testing.assert_allclose(hidden[:, 33:69], run(model, two), atol=3e-5)


def test_a_window_ends_what_a_token_depends_on():
    """Through three layers of window 5 a token sees itself and twelve before it."""
    model = Decoder(WINDOWED["every layer"], jax.random.key(0))
    first = tokens(1, 80)
    for changed in (20, 65):
        second = first.at[0, changed].add(1)
        differs = np.asarray(run(model, first) != run(model, second)).any(-1)[0]
        assert np.flatnonzero(differs).tolist() == list(range(changed, min(changed + 13, 80)))


def test_gradients_with_windows_do_not_depend_on_blocks_or_remat(monkeypatch):
    batch = tokens(2, 70)

    def grads(remat):
        model = Decoder(replace(WINDOWED["alternating"], remat=remat), jax.random.key(0))
        return jax.tree.leaves(jax.jit(lambda m: jax.grad(loss)(m, batch))(model))

    blocked = grads("none")
    monkeypatch.setattr(attention, "_BLOCKED_LENGTH", 1000)
    for a, b in zip(blocked, grads("full"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_layers_do_not_pay_for_keys_outside_their_window():
    def scores(config):
        model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
        hlo = jax.jit(lambda m, t: m(t)).lower(model, jnp.zeros((1, 512), jnp.int32)).as_text()
        shapes = re.findall(r"dot_general.*-> tensor<1x2x(\d+)x(\d+)xf32>", hlo)
        scores = [(int(q), int(s)) for q, s in shapes if CONFIG.head_dim not in (int(q), int(s))]
        return sum(q * s for q, s in scores) // 2  # two queries share a key head

    whole = scores(replace(WINDOWED["every layer"], sliding_window=512))
    assert whole == 512 * 512 * 5 // 8  # four blocks
    assert scores(WINDOWED["every layer"]) < 0.25 * whole


def test_a_long_window_costs_what_no_window_costs():
    plain = replace(WINDOWED["every layer"], sliding_window=None, sliding_layers=())
    for config in (plain, *(replace(x, sliding_window=64) for x in WINDOWED.values())):
        model = jax.eval_shape(lambda c=config: Decoder(c, jax.random.key(0)))
        assert "cond" not in str(jax.make_jaxpr(lambda m, t: m(t))(model, tokens(1, 64)))


def test_gemma_multiplies_by_one_more_than_the_weight_before_it_rounds():
    config = replace(WINDOWED["alternating"], dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (64, 32)).astype(jnp.bfloat16)
    scale = 0.1 * jax.random.normal(jax.random.key(1), (32,)).astype(jnp.bfloat16)
    wide, wide_scale = np.asarray(x, np.float32), np.asarray(scale, np.float32)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * (1 + wide_scale)
    got = np.asarray(rms_norm(x, scale, config))
    assert (got == exact.astype(got.dtype)).mean() > 0.99  # one rounding: exact but for ties
    embed = jnp.ones((2, 3072), jnp.bfloat16)
    scaled = embed_tokens(embed, jnp.asarray([1]), replace(config, embed_dim=3072))
    assert scaled.dtype == jnp.bfloat16 and scaled[0, 0] == 55.5  # sqrt(3072) is 55.43


def test_padding_before_a_segment_is_not_seen(model):
    row = tokens(1, 8)
    left = jnp.concatenate([jnp.full((1, 4), 9), row], axis=1)
    segments = jnp.asarray([[0] * 4 + [1] * 8])
    np.testing.assert_allclose(run(model, left, None, segments)[:, 4:], run(model, row), atol=5e-5)


def test_moving_all_positions_changes_nothing(model):
    row = tokens(1, 8)
    moved = run(model, row, jnp.arange(20, 28)[None])
    np.testing.assert_allclose(moved, run(model, row), atol=5e-5)
    uneven = run(model, row, jnp.arange(0, 16, 2)[None])
    assert jnp.abs(uneven - run(model, row)).max() > 1e-2


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_execution_choices_keep_the_gradients(model, remat, unroll):
    batch = tokens(2, 10)
    plain = gradient(model, batch)
    other = gradient(with_config(model, remat=remat, unroll_layers=unroll), batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_remat_saves_fewer_activations(model):
    batch = jnp.zeros((4, 48), jnp.int32)

    def temporary_bytes(remat):
        compiled = gradient.lower(with_config(model, remat=remat), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.75 * temporary_bytes("none")


def test_bfloat16_compute_keeps_float32_masters_and_outputs(model):
    half = with_config(model, dtype="bfloat16")
    batch = tokens(2, 10)
    hidden = run(half, batch)
    assert hidden.dtype == jnp.bfloat16
    logits, exact = half.logits(hidden), model.logits(run(model, batch))
    assert logits.dtype == jnp.float32
    assert 1e-4 < jnp.abs(logits - exact).max() < 0.15 * exact.std() + 0.1
    grads = gradient(half, batch)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_rotary_angles_of_late_positions_are_exact():
    config = replace(CONFIG, rope_theta=1e4)
    cos, _ = rope_tables(config, jnp.asarray([0, 257, 30_001]))
    exponents = np.arange(0, 16, 2) / 16
    expected = np.cos(np.asarray([0, 257, 30_001])[:, None] * 1e4**-exponents)
    np.testing.assert_allclose(cos, expected, atol=3e-3)
    np.testing.assert_allclose(cos[:2], expected[:2], atol=3e-5)
    x = jax.random.normal(jax.random.key(0), (3, 2, 16)).astype(jnp.bfloat16)
    tables = rope_tables(config, jnp.arange(3))
    assert apply_rope(x, *tables).dtype == jnp.bfloat16
    np.testing.assert_array_equal(apply_rope(x, *tables)[0], x[0])


def test_rms_norm_is_taken_in_float32():
    x = jnp.full((4,), 300.0, jnp.bfloat16) * jnp.asarray([1, 1, 1, 2], jnp.bfloat16)
    got = rms_norm(x, jnp.ones(4), CONFIG)
    np.testing.assert_allclose(
        got.astype(jnp.float32), np.asarray([1, 1, 1, 2]) / np.sqrt(7 / 4), rtol=1e-2
    )


def test_a_model_is_a_plain_tree_for_optax_and_learns(model):
    transform = optax.adam(1e-2)
    batch = tokens(4, 12)

    @jax.jit
    def step(model, state):
        value, grads = jax.value_and_grad(loss)(model, batch)
        updates, state = transform.update(grads, state, model)
        return optax.apply_updates(model, updates), state, value

    state, values = transform.init(model), []
    for _ in range(20):
        model, state, value = step(model, state)
        values.append(float(value))
    assert isinstance(model, Decoder)
    assert values[0] == pytest.approx(np.log(64), abs=0.7)
    assert values[-1] < 0.5 * values[0]


def test_the_layer_scan_returns_activations_only(model):
    jaxpr = jax.make_jaxpr(lambda model, batch: model(batch))(model, tokens(2, 10))
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 1
    assert [var.aval.shape for var in scans[0].outvars] == [(2, 10, CONFIG.embed_dim)]


def test_forward_builds_no_float64_and_calls_no_host(model):
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(model, tokens(2, 10)))
    assert "f64" not in jaxpr and "callback" not in jaxpr


def test_tied_embeddings_have_one_matrix_and_get_both_gradients():
    config = replace(CONFIG, tie_embeddings=True)
    model = Decoder(config, jax.random.key(0))
    assert not hasattr(model, "lm_head")
    np.testing.assert_array_equal(model.head(), model.embed[...].T)
    grads = gradient(model, jnp.zeros((1, 4), jnp.int32))
    assert jnp.all(jnp.any(grads.embed[...] != 0, axis=-1))  # unseen tokens too, as outputs


def test_value_head_starts_at_its_bias_and_its_gradient_reaches_the_kernel(model):
    critic = ActorCritic(model, ValueHead(CONFIG.embed_dim, bias=1.5))
    batch = tokens(2, 5)

    def value_loss(critic):
        values_BT = critic.value_head(critic.decoder(batch))
        return jnp.mean(jnp.square(values_BT - 2.0)), values_BT

    (_, values_BT), grads = jax.jit(jax.value_and_grad(value_loss, has_aux=True))(critic)
    assert values_BT.shape == (2, 5) and values_BT.dtype == jnp.float32
    np.testing.assert_array_equal(values_BT, 1.5)
    assert jnp.any(grads.value_head.kernel[...] != 0)
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(grads.decoder))  # the kernel is zero
