"""What the rules of TnT-LLM cluster: words that occur together, and neighbours."""

import numpy as np
import pytest

from jaxconv.recipes.tnt_mixture import fit_mixture, latent, normalized, smoothed

TOPICS = (("soup", "bread", "salt", "oven"), ("query", "merge", "test", "parser"))


def texts(n: int, *, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Two words of a topic each, among words of every text."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, n)
    pairs = [rng.choice(TOPICS[k], 2, replace=False) for k in kinds]
    return [f"please help me with {a} and {b}" for a, b in pairs], kinds


def test_texts_that_share_no_word_are_near_when_their_words_occur_together():
    said, _ = texts(80)
    both = [*said, "soup and bread", "salt and oven", "merge and test"]
    x_ND = latent(both, range(80), seed=0)
    bread, oven, code = x_ND[-3:]
    assert bread @ oven > 0.5 > 0.2 > abs(bread @ code)
    np.testing.assert_allclose(np.linalg.norm(x_ND, axis=1), 1, atol=1e-5)


def test_what_is_not_learned_from_changes_nothing_and_unknown_words_are_zeros():
    said, _ = texts(60)
    one = latent([*said, "soup"], range(60), seed=0)
    two = latent([*said, "лодка", "soup soup"], range(60), seed=0)
    np.testing.assert_array_equal(one[:60], two[:60])
    assert not two[60].any() and two[61].any()
    assert not latent(["?", "!", "…"], range(3), seed=0).any()
    assert not latent(["one", "two"], range(2), seed=0).any()  # no word of two texts


def test_averaging_brings_texts_of_a_kind_together():
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 300)
    x_ND = normalized(np.eye(16)[kinds] + 0.4 * rng.normal(size=(300, 16)))
    near = smoothed(x_ND, range(250))

    def spread(x):
        return np.mean([x[kinds == k].std(0).sum() for k in range(3)])

    assert spread(near) < 0.75 * spread(x_ND)
    np.testing.assert_array_equal(smoothed(x_ND[:251], range(250))[:250], near[:250])


def test_a_mixture_is_likelier_where_its_texts_are():
    rng = np.random.default_rng(1)
    x_ND = np.concatenate([rng.normal(m, 0.1, (50, 4)) for m in (-1.0, 1.0)]).astype(np.float32)
    mixture = fit_mixture(x_ND, np.arange(100), 2, seed=0)
    assert mixture.variance == pytest.approx(0.01, rel=0.2)
    assert mixture.weights == pytest.approx([0.5, 0.5])
    assert mixture.likelihood(x_ND) > mixture.likelihood(x_ND + 0.5)
