"""The sampler's random numbers, and the frequencies that come of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels import sample
from jaxconv_kernels.sampling import noise
from scipy import stats


def test_domain_zero_is_the_noise_of_jax_random():
    keys = jax.random.split(jax.random.key(7), 3)
    keys_B2 = jax.random.key_data(keys)
    ids = jnp.arange(1000, dtype=jnp.int32)[None]
    bits = noise.bits(keys_B2, noise.TOKENS, ids)
    np.testing.assert_array_equal(bits, jax.vmap(lambda k: jax.random.bits(k, (1000,)))(keys))
    expected = jax.vmap(lambda k: jax.random.gumbel(k, (1000,)))(keys)
    np.testing.assert_array_equal(jax.jit(noise.gumbel)(bits), expected)


def test_threefry_gives_the_published_answers():
    """Known answers of Random123: key and counter of zeros, and of ones."""
    ones = 0xFFFFFFFF
    zero = noise.bits(jnp.zeros((1, 2), jnp.uint32), 0, jnp.zeros((1, 1), jnp.uint32))
    assert int(zero[0, 0]) == 0x6B200159 ^ 0x99BA4EFE
    keys = jnp.full((1, 2), ones, jnp.uint32)
    one = noise.bits(keys, ones, jnp.full((1, 1), ones, jnp.uint32))
    assert int(one[0, 0]) == 0x1CB996FC ^ 0xBB002BE7


def test_domains_and_ids_have_noise_of_their_own():
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    ids = jnp.arange(64, dtype=jnp.int32)[None]
    drawn = [noise.bits(keys, domain, ids) for domain in range(3)]
    assert len(np.unique(np.stack(drawn))) == 3 * 2 * 64


def test_exponentials_are_those_of_float64_from_the_smallest_to_the_largest():
    few = np.array([0, 1, 2, 2**22 - 1, 2**22, 2**31, 2**32 - 129, 2**32 - 1], np.uint64)
    many = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint64)
    bits = np.concatenate([few, many, many >> np.uint64(12)])
    got = np.asarray(jax.jit(noise.exponential)(bits.astype(np.uint32)))
    u = np.minimum((np.float64(bits) + 0.5) / 2**32, 1 - 2.0**-24)
    # Small ones decide; those above 5 have the few digits that 1 - u has left.
    np.testing.assert_allclose(got[u < 0.99], -np.log1p(-u[u < 0.99]), rtol=7e-5)
    np.testing.assert_allclose(got, -np.log1p(-u), rtol=5e-3)
    assert got.min() == np.float32(2.0**-33) and got.max() == pytest.approx(16.6355, abs=1e-4)


@functools.partial(jax.jit, static_argnames=("rows", "filters"))
def _tokens(x, key, rows, filters=()):
    logits = jnp.broadcast_to(x, (rows, len(x)))
    return sample(logits, jax.random.split(key, rows), **dict(filters)).token


def counts_of(x, draws, rows, filters=(), seed=0):
    keys = jax.random.split(jax.random.key(seed), draws // rows)
    tokens = np.concatenate([_tokens(jnp.asarray(x), key, rows, filters) for key in keys])
    return np.bincount(tokens, minlength=len(x))


CASES = {
    "two levels, small": (np.random.default_rng(0).normal(size=300) * 1.5, ()),
    "two levels, large": (-1.2 * np.log1p(np.random.default_rng(1).permutation(4100)), ()),
    "tempered": (np.random.default_rng(2).normal(size=100), (("temperature", 0.5),)),
    "filtered": (np.random.default_rng(3).normal(size=100), (("top_k", 30), ("top_p", 0.8))),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_follow_the_distribution(case):
    """Chi-square, tokens of few expected draws in bins together; Bonferroni over the cases."""
    x, filters = CASES[case]
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | dict(filters)
    counts = counts_of(x.astype(np.float32), 20_480, 2048, filters)
    order = np.argsort(-x)
    mass = np.exp(x[order] / settings["temperature"])
    if settings["top_k"]:
        mass[settings["top_k"] :] = 0
    if settings["top_p"] < 1:
        mass[np.cumsum(mass) - mass >= settings["top_p"] * mass.sum()] = 0
    expected, counts = counts.sum() * mass / mass.sum(), counts[order]
    assert counts[expected == 0].sum() == 0
    # Bins of neighbours in rank, each of at least 30 expected draws.
    bins = np.floor(np.cumsum(expected) / 30)
    starts = np.flatnonzero(np.r_[True, np.diff(bins) > 0])
    starts = starts[starts < np.count_nonzero(expected)]
    observed, wanted = np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)
    assert stats.chisquare(observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum())[
        1
    ] > 0.001 / len(CASES)
    assert len(starts) > 10


def test_the_rare_tail_is_drawn_as_often_as_it_should():
    """A G-test: 299 tokens of 1e-5 each, which 40 thousand draws meet some 120 times."""
    x = np.full(300, np.log(1e-5 / (1 - 299e-5)), np.float32)
    x[150] = 0.0
    counts = counts_of(x, 204_800, 8192)
    tail = np.delete(counts, 150)
    groups = np.append(np.add.reduceat(tail, np.arange(0, 299, 30)), counts[150])
    sizes = np.append(np.full(9, 30), 29)
    share = np.append(sizes * 1e-5, 1 - 299e-5)
    wanted = counts.sum() * share
    assert stats.power_divergence(groups, wanted, lambda_="log-likelihood")[1] > 0.001
