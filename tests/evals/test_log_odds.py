"""Log-odds with a Dirichlet prior against numbers worked out by hand."""

import math

import numpy as np
import pytest

from jaxconv.evals.log_odds import log_odds


def test_two_words_by_hand():
    # A prior of 2 words, one of each: the counts become 4 and 2 against 2 and 4.
    delta, z = log_odds(np.array([3, 1]), np.array([1, 3]), np.array([5, 5]), strength=2.0)
    first = math.log(4 / 2) - math.log(2 / 4)
    assert delta == pytest.approx([first, -first])
    deviation = math.sqrt(1 / 4 + 1 / 2)
    assert z == pytest.approx([first / deviation, -first / deviation])


def test_sets_of_any_size_are_compared_by_shares_and_rare_words_are_less_sure():
    counts = np.array([100, 10, 1, 889])
    prior = np.array([100.0, 10.0, 1.0, 889.0])
    delta, z = log_odds(counts, counts * 3, prior, strength=10.0)
    assert np.abs(delta).max() < 0.05 and np.abs(z).max() < 0.05
    delta, z = log_odds(np.array([40, 4, 956]), np.array([10, 1, 989]), np.ones(3), strength=3.0)
    assert z[0] > z[1] > 0 and delta[0] > 0


def test_the_prior_holds_back_what_was_seen_once():
    weak = log_odds(np.array([1, 99]), np.array([0, 100]), np.array([1, 99]), strength=1.0)[0]
    strong = log_odds(np.array([1, 99]), np.array([0, 100]), np.array([1, 99]), strength=1e4)[0]
    assert weak[0] > 2 and abs(strong[0]) < 0.02


@pytest.mark.parametrize(
    ("first", "prior", "strength"),
    [
        ([1.0], [1.0, 1.0], 1.0),
        ([1.0], [1.0], 1.0),
        ([1.0, 2.0], [1.0, 0.0], 1.0),
        ([1.0, 2.0], [1.0, 1.0], 0.0),
    ],
)
def test_what_is_no_prior_is_refused(first, prior, strength):
    with pytest.raises(ValueError):
        log_odds(np.array(first), np.ones_like(prior), np.array(prior), strength=strength)
