"""Tests of frequencies, beyond those of the noise: filtered paths, the rare tail, other rows' keys.

Every test here fails by chance once in a thousand seeds, and its seed is fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import sample
from jaxconv_kernels.sampling import spec
from scipy import stats

CHANCE = 0.001
VOCAB = 4099  # of three cells, and no multiple of 128
DRAWS, ROWS = 8192, 2048
LEAST = 20  # expected draws of a bin
PARAMETERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@jax.jit
def _sample(x_V, keys, parameters):
    """Compiled once for all: parameters are data."""
    logits = jnp.broadcast_to(x_V, (len(keys), len(x_V)))
    return sample(logits, keys, **parameters)


def draw(x_V, keys, **parameters):
    """(tokens, flags) of a row for each key, all of the same logits; `ROWS` at a time."""
    drawn = [
        _sample(jnp.asarray(x_V, jnp.float32), keys[i : i + ROWS], PARAMETERS | parameters)
        for i in range(0, len(keys), ROWS)
    ]
    return (np.concatenate([getattr(d, name) for d in drawn]) for name in ("token", "flags"))


def binned(counts, expected):
    """Neighbours in rank together, so that every bin has `LEAST` expected draws or more."""
    order = np.argsort(-expected)
    counts, expected = counts[order], expected[order]
    assert not counts[expected == 0].any()
    counts, expected = (x[: np.count_nonzero(expected)] for x in (counts, expected))
    edges = np.flatnonzero(np.diff(np.floor(np.cumsum(expected) / LEAST), prepend=-1))
    counts, expected = (np.add.reduceat(x, edges) for x in (counts, expected))
    # The last bin may be short of its draws.
    counts[-2] += counts[-1]
    expected[-2] += expected[-1]
    return counts[:-1], expected[:-1]


def falling(power):
    """Logits in no order of a power law."""
    return -power * np.log1p(np.random.default_rng(0).permutation(VOCAB))


# Name: logits, parameters, and what a row must be flagged with.
CASES = {
    "tempered": (falling(1.0), {"temperature": 1.4}, 0),
    "candidates": (falling(1.2), {"top_k": 200, "top_p": 0.9}, spec.FILTERED),
    "least share": (falling(1.2), {"min_p": 0.01, "temperature": 0.8}, spec.FILTERED),
    "exact passes": (falling(0.2), {"top_p": 0.9}, spec.FILTERED | spec.FALLBACK),
}


@pytest.mark.parametrize("case", CASES)
def test_every_path_of_a_large_vocabulary_follows_its_distribution(case):
    """Chi-square; Bonferroni over the cases."""
    x_V, parameters, flags = CASES[case]
    tokens, flagged = draw(x_V, jax.random.split(jax.random.key(1), DRAWS), **parameters)
    assert (flagged == flags).all()
    p = PARAMETERS | parameters
    order = np.argsort(-x_V)
    mass = np.exp((x_V - x_V.max())[order] / p["temperature"])
    kept = (np.arange(VOCAB) < (p["top_k"] or VOCAB)) & (mass >= p["min_p"])
    mass *= kept
    mass *= np.cumsum(mass) - mass < p["top_p"] * mass.sum()
    expected = np.zeros(VOCAB)
    expected[order] = DRAWS * mass / mass.sum()
    counts, expected = binned(np.bincount(tokens, minlength=VOCAB), expected)
    assert len(counts) > 10
    assert stats.chisquare(counts, expected).pvalue > CHANCE / len(CASES)


def test_the_rare_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should():
    """A G-test by cell: all tokens but one have 2e-5 each, and meet some 1300 of the draws."""
    share = np.full(VOCAB, 2e-5)
    share[2500] = 1 - share.sum() + 2e-5
    draws = 1 << 14
    tokens, _ = draw(np.log(share), jax.random.split(jax.random.key(2), draws))
    counts = np.bincount(tokens, minlength=VOCAB)
    # Cells of the rule are larger: 16 groups of tokens cut across all three.
    groups = np.arange(VOCAB) * 16 // VOCAB
    groups[2500] = 16
    observed, wanted = (np.bincount(groups, weights=w) for w in (counts, draws * share))
    assert stats.power_divergence(observed, wanted, lambda_="log-likelihood").pvalue > CHANCE
    # In every group its tokens take turns: nothing but a few is drawn more than twice.
    assert np.sort(np.delete(counts, 2500))[-1] <= 5


@pytest.mark.parametrize("parameters", [{}, {"top_k": 3000}], ids=["plain", "filtered"])
def test_rows_with_keys_of_their_own_are_independent(parameters):
    """The tokens of neighbouring streams at a position, and of a stream at neighbouring positions.

    Keys are made as a rollout makes them. The largest dependence, that neighbours draw alike, and
    every other shows in a table of 8 x 8 groups of tokens of like mass.
    """
    streams, positions = 512, 16
    run, x_V = jax.random.key(3), falling(0.7)
    of_stream = jax.vmap(lambda i: jax.random.fold_in(run, i))(jnp.arange(streams))
    keys = jax.vmap(
        lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(positions))
    )
    tokens, _ = draw(x_V, keys(of_stream).ravel(), **parameters)
    tokens = tokens.reshape(streams, positions)
    mass = np.exp(x_V - np.max(x_V))
    order = np.argsort(-mass)
    group_V = np.zeros(VOCAB, int)
    group_V[order] = np.minimum(np.cumsum(mass[order]) / mass.sum() * 8, 7).astype(int)
    group = group_V[tokens]
    for one, other in ((group[:-1], group[1:]), (group[:, :-1], group[:, 1:])):
        table = np.zeros((8, 8))
        np.add.at(table, (one.ravel(), other.ravel()), 1)
        assert table.sum(0).min() > 100
        assert stats.chi2_contingency(table).pvalue > CHANCE / 4
