"""Ranking losses against enumeration of pairs and permutations, and numerical gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxconv.objectives.ranking import (
    PAIRWISE_KINDS,
    listmle_loss,
    listnet_loss,
    ndcg,
    ndcg_deltas,
    pairwise_loss,
)


@jax.jit
def hinge_loss(scores, relevance, mask=None):
    return pairwise_loss(scores, relevance, mask, kind="hinge")


@jax.jit
def lambda_loss(scores, relevance, mask=None):
    return pairwise_loss(scores, relevance, mask, weights=ndcg_deltas(scores, relevance, mask))


LOSSES = [
    jax.jit(pairwise_loss),
    hinge_loss,
    lambda_loss,
    jax.jit(listnet_loss),
    jax.jit(listmle_loss),
]
NAMES = ["logistic", "hinge", "lambda", "listnet", "listmle"]
of_every_loss = pytest.mark.parametrize("loss", LOSSES, ids=NAMES)


def lists(seed, B=3, N=5, levels=4):
    """(scores, relevance, mask) with NaN wherever there is no document."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, N)) < 0.8
    scores = np.where(mask, rng.normal(size=(B, N)), np.nan)
    return scores, np.where(mask, rng.integers(0, levels, size=(B, N)), np.nan), mask


# ---- enumeration


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), kind=st.sampled_from(PAIRWISE_KINDS))
def test_pairwise_equals_a_loop_over_pairs(seed, kind):
    scores, relevance, mask = lists(seed)
    weights = np.random.default_rng(seed).random((3, 5, 5))
    expected = count = right = 0.0
    for b, i, j in itertools.product(range(3), range(5), range(5)):
        if mask[b, i] and mask[b, j] and relevance[b, i] > relevance[b, j]:
            ahead = scores[b, i] - scores[b, j]
            loss = np.log1p(np.exp(-ahead)) if kind == "logistic" else max(0.0, 1.0 - ahead)
            expected += weights[b, i, j] * loss
            count += 1
            right += ahead > 0
    total, denominator, metrics = pairwise_loss(scores, relevance, mask, kind=kind, weights=weights)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert denominator == count
    assert metrics.sums["accuracy"] == right


def test_tied_scores_are_half_right():
    _, count, metrics = pairwise_loss(np.zeros((1, 3)), np.array([[2, 1, 0]]))
    assert metrics.means(count)["accuracy"] == 0.5


@pytest.mark.parametrize("N", [1, 2, 4])
def test_listmle_is_the_plackett_luce_likelihood(N):
    # Over all orders the likelihoods sum to one, and each is the product of its choices.
    scores = np.random.default_rng(N).normal(size=N)
    mass = 0.0
    for order in itertools.permutations(range(N)):
        relevance = np.empty(N)
        relevance[list(order)] = np.arange(N, 0, -1)
        # a single document is beside one that is not there
        padded = [np.append(x, np.nan)[None] for x in (scores, relevance)]
        loss, _, _ = listmle_loss(*padded, np.append(np.ones(N), 0)[None])
        likelihood = 1.0
        for k in range(N):
            left = np.exp(scores[list(order[k:])])
            likelihood *= left[0] / left.sum()
        assert np.exp(-float(loss)) == pytest.approx(likelihood, rel=1e-5)
        mass += np.exp(-float(loss))
    assert mass == pytest.approx(1.0, rel=1e-5)


def test_listnet_by_hand():
    scores, relevance = np.array([[0.0, 1.0, -1.0]]), np.array([[2.0, 0.0, 1.0]])
    target = np.exp(relevance / 0.5) / np.exp(relevance / 0.5).sum()
    expected = -np.sum(target * np.log(np.exp(scores) / np.exp(scores).sum()))
    total, count, metrics = listnet_loss(scores, relevance, temperature=0.5)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert count == 1 and metrics.sums["top1"] == 0.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999))
def test_listnet_is_least_where_scores_are_relevances(seed):
    _, relevance, mask = lists(seed)
    least, _, _ = listnet_loss(relevance, relevance, mask)
    gradient = jax.grad(lambda s: listnet_loss(s, relevance, mask)[0])(relevance)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    other = relevance + np.random.default_rng(seed).normal(size=relevance.shape)
    assert listnet_loss(other, relevance, mask)[0] >= least - 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999))
def test_ndcg_and_its_deltas_equal_swapping_ranks(seed):
    scores, relevance, mask = lists(seed, B=1)

    def by_hand(order):
        gains = [2 ** relevance[0, i] - 1 for i in order]
        ideal = sorted(gains, reverse=True)

        def discounted(gains):
            return sum(g / np.log2(2 + k) for k, g in enumerate(gains))

        return discounted(gains) / discounted(ideal) if sum(gains) else 1.0

    there = np.flatnonzero(mask[0])
    order = sorted(there, key=lambda i: -scores[0, i])
    assert float(ndcg(scores, relevance, mask)[0]) == pytest.approx(by_hand(order), rel=1e-5)
    deltas = np.asarray(ndcg_deltas(scores, relevance, mask))[0]
    for i, j in itertools.product(range(5), range(5)):
        expected = 0.0
        if mask[0, i] and mask[0, j]:
            swapped = [{i: j, j: i}.get(k, k) for k in order]
            expected = abs(by_hand(order) - by_hand(swapped))
        assert deltas[i, j] == pytest.approx(expected, abs=1e-5)


def test_top1_counts_ties_in_shares():
    scores = np.array([[1.0, 1.0, 0.0], [3.0, 1.0, 9.0]])
    relevance = np.array([[2.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    _, count, metrics = listmle_loss(scores, relevance)
    assert count == 2 and metrics.sums["top1"] == 1.5


# ---- what all have in common


@of_every_loss
def test_gradients_equal_finite_differences(loss):
    scores, relevance, mask = lists(0)
    with jax.enable_x64():
        check_grads(
            lambda s: loss(s, relevance, mask)[0],
            (np.where(mask, scores, 0.0),),
            order=1,
            modes=("rev",),
            atol=1e-6,
            rtol=1e-6,
        )


@of_every_loss
def test_only_differences_of_scores_matter(loss):
    scores, relevance, mask = lists(1)
    with jax.enable_x64():
        shifted = loss(scores + np.array([[3.0], [-50.0], [0.1]]), relevance, mask)[0]
        assert shifted.dtype == np.float64
        np.testing.assert_allclose(shifted, loss(scores, relevance, mask)[0], rtol=1e-10)


@of_every_loss
def test_documents_that_are_not_there_and_micro_batches(loss):
    scores, relevance, mask = lists(2, B=4)
    mask[1], mask[2, 1:] = False, False  # an empty list, a list of one
    scores[~mask], relevance[~mask] = np.nan, np.nan
    total, denominator, _ = loss(scores, relevance, mask)
    gradient = jax.grad(lambda s: loss(s, relevance, mask)[0])(scores.astype(np.float32))
    assert np.all(np.isfinite(gradient)) and np.all(gradient[~mask] == 0)
    wider = [np.pad(x, ((0, 0), (0, 3))) for x in (scores, relevance, mask)]
    np.testing.assert_allclose(loss(*wider)[0], total, rtol=1e-5)
    parts = [loss(scores[cut], relevance[cut], mask[cut]) for cut in (slice(0, 3), slice(3, 4))]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], total, rtol=1e-5)
    assert parts[0][1] + parts[1][1] == denominator


@of_every_loss
def test_training_the_scores_finds_the_order(loss):
    relevance = jnp.array([[2.0, 0.0, 3.0, 1.0]])
    scores = jnp.array([[0.1, 0.3, -0.2, 0.0]])
    step = jax.jit(lambda s: s - 0.3 * jax.grad(lambda s: loss(s, relevance)[0])(s))
    for _ in range(60):
        scores = step(scores)
    assert ndcg(scores, relevance)[0] == pytest.approx(1.0)


def test_refusals_name_the_value():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="kind is 'exponential'"):
        pairwise_loss(x, x, kind="exponential")
    with pytest.raises(ValueError, match=r"weights has shape \(2, 3\)"):
        pairwise_loss(x, x, weights=x)
    with pytest.raises(ValueError, match=r"relevance has shape \(3,\)"):
        listmle_loss(x, np.zeros(3))
    with pytest.raises(ValueError, match=r"scores has shape \(3,\)"):
        listmle_loss(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        listnet_loss(x, x, temperature=0.0)
