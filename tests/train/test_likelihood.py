"""Log-probs of packed streams against each stream alone, and the objectives made of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.data.batches import Assembler, Share
from jaxconv.data.packing import first_fit, pack_tokens
from jaxconv.data.plan import plan
from jaxconv.data.token_store import TokenStore
from jaxconv.models.lora import LoraConfig
from jaxconv.train import likelihood
from jaxconv.train.likelihood import DPOObjective, Scorer, sft_objective, token_logprobs
from jaxconv.train.mesh import data_mesh
from jaxconv.train.trainable import join, merged, split

ROWS, WIDTH = 2, 32
LORA = LoraConfig(2, 4.0, ("q_proj", "v_proj", "down_proj"), dropout=0.5)


def store_of(lengths, *, streams: int, empty=()) -> TokenStore:
    """Random streams; those in `empty` have nothing to be learned."""
    rng = np.random.default_rng(0)
    masks = [rng.random(n) < 0.6 for n in lengths]
    for i, mask in enumerate(masks):
        mask[-1] = True
        if i in empty:
            mask[:] = False
    return TokenStore(
        rng.integers(0, 40, sum(lengths)).astype("i4"),
        np.concatenate(masks),
        np.cumsum([0, *lengths]),
        np.arange(len(lengths) // streams),
        streams,
        {},
    )


@pytest.fixture(scope="module")
def pairs() -> TokenStore:
    """Pairs of all sizes up to a whole row, some rows with several."""
    rng = np.random.default_rng(1)
    short = [(int(a), int(b)) for a, b in rng.integers(2, 9, (9, 2))]
    lengths = [*short, (20, 12), (2, 30), (17, 3)]
    return store_of([n for pair in lengths for n in pair], streams=2)


@pytest.fixture(scope="module")
def model(small_actor_critic):
    return small_actor_critic()


@pytest.fixture(scope="module")
def alone(model, judge):
    """(stream's tokens) -> float64 [n - 1, V], log-probs of what follows each token, by itself."""

    def logprobs(streams):
        logits, _ = judge(model, streams, WIDTH)
        z = logits.astype(np.float64)
        z -= z.max(-1, keepdims=True)
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        return [x[: len(s) - 1] for x, s in zip(z, streams, strict=True)]

    return logprobs


def shaken(tree, size=0.1, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + size * rng.normal(size=x.shape).astype("f4"), tree)


# ---------------------------------------------------------------- log-probs


def test_log_probs_and_entropies_are_those_of_each_stream_alone(model, alone):
    rng = np.random.default_rng(2)
    streams = [rng.integers(0, 40, n) for n in (WIDTH, 20, 3, 9, 1, 2, 15, 16, 2)]
    packing = first_fit([len(s) for s in streams], WIDTH, rows_multiple=ROWS)
    assert len(set(packing.row)) < len(streams)
    batch = pack_tokens(packing, streams, [np.ones(len(s), bool) for s in streams])
    found = jax.jit(token_logprobs)(model.decoder, batch)
    assert all(x.shape == batch.tokens.shape and x.dtype == jnp.float32 for x in found)
    logprobs, entropies = map(packing.gather, jax.device_get(found))
    for s, table, logprob, entropy in zip(
        streams, alone(streams), logprobs, entropies, strict=True
    ):
        for i in range(len(s) - 1):
            np.testing.assert_allclose(logprob[i], table[i, s[i + 1]], rtol=1e-5, atol=1e-5)
            expected = -(np.exp(table[i]) * table[i]).sum()
            np.testing.assert_allclose(entropy[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_scorer_sums_what_is_to_be_learned_stream_by_stream(model, alone, streams):
    """Several batches; streams of half a row and more, of one token, and with an empty mask."""
    lengths = [WIDTH, 20, 17, 5, 1, 2, 9, 16, 3, 30, 8, 2]
    store = store_of(lengths, streams=streams, empty=(3,))
    scorer = Scorer(data_mesh(ROWS), rows=ROWS, width=WIDTH)
    sums, counts = scorer(model.decoder, None, store)
    assert sums.shape == counts.shape == (12 // streams, streams)
    assert sums.dtype == np.float64 and counts.dtype.kind == "i"
    tables = alone([store.stream(i).tokens for i in range(12)])
    for i, (found, count) in enumerate(zip(sums.reshape(-1), counts.reshape(-1), strict=True)):
        stream = store.stream(i)
        learned = np.flatnonzero(stream.mask[1:])
        expected = sum(tables[i][at, stream.tokens[at + 1]] for at in learned)
        assert count == len(learned)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sums.reshape(-1)[3] == counts.reshape(-1)[3] == 0
    assert sums.reshape(-1)[4] == counts.reshape(-1)[4] == 0  # nothing comes before a first token


def test_the_scorer_plans_a_store_once_and_is_a_batch_ahead_of_the_numbers(
    model, pairs, monkeypatch
):
    order = []

    def seen(name, function):
        def call(*args, **kwargs):
            order.append(name)
            return function(*args, **kwargs)

        return call

    scorer = Scorer(data_mesh(ROWS), rows=ROWS, width=WIDTH)
    expected = scorer(model.decoder, None, pairs)
    for name in ("plan_once", "_score"):
        monkeypatch.setattr(likelihood, name, seen(name, getattr(likelihood, name)))
    monkeypatch.setattr(jax, "device_get", seen("device_get", jax.device_get))
    found = scorer(model.decoder, None, pairs)
    batches = order.count("_score")
    assert batches > 2
    assert order == ["_score", *["_score", "device_get"] * (batches - 1), "device_get"]
    np.testing.assert_array_equal(found, expected)
    other = dataclasses.replace(pairs)
    scorer(model.decoder, None, other)
    scorer(model.decoder, None, other)
    assert order.count("plan_once") == 1


def test_an_adapter_is_scored_without_dropout_as_its_merger(model, pairs):
    trained, resting = split(model.decoder, LORA, jax.random.key(0))
    trained = shaken(trained)
    scorer = Scorer(data_mesh(ROWS), rows=ROWS, width=WIDTH)
    apart, tokens = scorer(trained, resting, pairs)
    one, _ = scorer(merged(trained, resting), None, pairs)
    base, _ = scorer(resting, None, pairs)
    np.testing.assert_allclose(apart, one, rtol=1e-4)
    assert np.abs(apart - base).max() > 0.1 and tokens.min() > 0


# ---------------------------------------------------------------- objectives


def batches(store, *, reference=None, pack=True):
    """Micro-batches of one epoch, all of one shape."""
    placements = plan(store.lengths, rows=ROWS, width=WIDTH, seed=0, epochs=1, pack=pack)
    assemble = Assembler(store, Share(ROWS), seed=0, reference=reference)
    return [jax.tree.map(lambda x: x[0], assemble(p).batch) for p in placements]


@functools.cache
def gradient_of(objective):
    return jax.jit(jax.value_and_grad(lambda *args: with_aux(objective(*args)), has_aux=True))


def with_aux(result):
    total, denominator, metrics = result
    return total, (denominator, metrics)


def whole(objective, model, some, *constants):
    """(sum, denominator, metrics, gradient) of all micro-batches together."""
    total, denominator, sums, gradient = 0.0, 0.0, {}, None
    for batch in some:
        (t, (d, m)), g = gradient_of(objective)(model, batch, *constants)
        total, denominator = total + float(t), denominator + float(d)
        sums = {name: sums.get(name, 0.0) + float(x) for name, x in m.sums.items()}
        gradient = g if gradient is None else jax.tree.map(jnp.add, gradient, g)
    return total, denominator, sums, gradient


def assert_same(one, other, rtol=1e-5):
    for x, y in zip(one[:2], other[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol)
    assert one[2].keys() == other[2].keys()
    for name, x in one[2].items():
        np.testing.assert_allclose(x, other[2][name], rtol=rtol, atol=1e-4, err_msg=name)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one[3]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=rtol * scale),
        one[3],
        other[3],
    )


SIGMOID = DPOObjective(0.1, "sigmoid")


@pytest.fixture(scope="module")
def policy(model):
    return shaken(model.decoder, 0.02)


@pytest.fixture(scope="module")
def scored(model, pairs):
    """float32 [n, 2] under the model, as a stage keeps it."""
    scorer = Scorer(data_mesh(ROWS), rows=ROWS, width=WIDTH)
    return scorer(model.decoder, None, pairs)[0].astype("f4")


def test_imitation_is_the_sum_over_the_learned_tokens(model, pairs):
    scorer = Scorer(data_mesh(ROWS), rows=ROWS, width=WIDTH)
    logprobs, tokens = scorer(model.decoder, None, pairs)
    total, denominator, sums, _ = whole(sft_objective, model.decoder, batches(pairs), None)
    np.testing.assert_allclose(total, -logprobs.sum(), rtol=1e-5)
    assert denominator == tokens.sum()
    np.testing.assert_allclose(sums["nll"], total, rtol=1e-6)
    assert 0 < sums["entropy"] / denominator < math.log(40)


@pytest.mark.parametrize(
    "objective",
    [sft_objective, SIGMOID, DPOObjective(2.0, "simpo", gamma=0.5, sft_weight=0.3)],
    ids=["sft", "dpo", "simpo"],
)
def test_packing_changes_nothing(policy, pairs, scored, objective):
    packed = batches(pairs, reference=scored)
    alone = batches(pairs, reference=scored, pack=False)
    assert len(packed) < len(alone)
    one, other = (whole(objective, policy, some, None) for some in (packed, alone))
    assert_same(one, other)


def test_a_reference_may_be_computed_before_or_now(model, policy, pairs, scored):
    before = whole(SIGMOID, policy, batches(pairs, reference=scored), None)
    now = whole(SIGMOID, policy, batches(pairs), None, model.decoder)
    assert before[1] == len(pairs)
    assert_same(before, now)


def test_the_reference_of_an_adapter_is_its_base(model, pairs, scored):
    """Also while the adapter's own dropout is on."""
    trained, resting = split(model.decoder, LORA, jax.random.key(0))
    trained = shaken(trained)
    before = whole(SIGMOID, trained, batches(pairs, reference=scored), resting)
    now = whole(SIGMOID, trained, batches(pairs), resting)
    assert jax.tree.structure(now[3]) == jax.tree.structure(trained)
    assert_same(before, now)


def test_dropout_is_that_of_the_rows_seeds(model, pairs):
    trained, resting = split(model.decoder, LORA, jax.random.key(0))
    trained, (batch, *_) = shaken(trained), batches(pairs)
    logprobs = jax.jit(lambda seeds: token_logprobs(join(trained, resting), batch.tokens, seeds)[0])
    one, other = logprobs(batch.dropout_seeds), logprobs(batch.dropout_seeds + 1)
    np.testing.assert_array_equal(one, logprobs(batch.dropout_seeds))
    assert not np.allclose(one, other)


def test_a_policy_that_is_its_reference_cannot_tell_a_pair_apart(model, pairs, scored):
    trained, resting = split(model.decoder, LORA, jax.random.key(0))
    starts = {
        "precomputed": whole(SIGMOID, model.decoder, batches(pairs, reference=scored), None),
        "live": whole(SIGMOID, model.decoder, batches(pairs), None, model.decoder),
        "adapter": whole(SIGMOID, trained, batches(pairs), resting),
    }
    for name, (total, denominator, sums, gradient) in starts.items():
        assert denominator == len(pairs)
        np.testing.assert_allclose(total / denominator, math.log(2), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(sums["rewards/margin"], 0, atol=1e-4)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-3


def test_the_likelihood_of_the_chosen_answer_is_added_a_token(policy, pairs, scored):
    some = batches(pairs, reference=scored)
    without = whole(SIGMOID, policy, some, None)
    added = whole(DPOObjective(0.1, "sigmoid", sft_weight=0.7), policy, some, None)
    scorer = Scorer(data_mesh(ROWS), rows=ROWS, width=WIDTH)
    logprobs, tokens = scorer(policy, None, pairs)
    each = -logprobs[:, 0] / tokens[:, 0]
    np.testing.assert_allclose(added[0] - without[0], 0.7 * each.sum(), rtol=1e-4)
    assert added[1] == without[1]
    moved = [
        bool((x != y).any())
        for x, y in zip(jax.tree.leaves(added[3]), jax.tree.leaves(without[3]), strict=True)
    ]
    assert all(moved)


def test_a_pair_with_nothing_to_learn_on_one_side_does_not_count(policy):
    lengths = [4, 6, 5, 3, 7, 7]
    store = store_of(lengths, streams=2, empty=(3,))
    total, denominator, *_ = whole(
        DPOObjective(0.1, "cpo", sft_weight=1.0), policy, batches(store), None
    )
    assert denominator == 2 and np.isfinite(total)
    kept = TokenStore(
        np.delete(store.tokens, np.s_[10:18]),
        np.delete(store.mask, np.s_[10:18]),
        np.cumsum([0, 4, 6, 7, 7]),
        np.arange(2),
        2,
        {},
    )
    other = whole(DPOObjective(0.1, "cpo", sft_weight=1.0), policy, batches(kept), None)
    np.testing.assert_allclose(total, other[0], rtol=1e-5)
