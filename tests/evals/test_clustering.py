"""Agreement of groupings against scikit-learn, and what chance gets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from jaxconv.evals.clustering import clustering_agreement, majority_classes


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), min_size=4, max_size=40)
)
def test_values_equal_scikit_learn(pairs):
    groups, classes = zip(*pairs, strict=True)
    found = clustering_agreement(groups, classes)
    assert found.ari.value == pytest.approx(adjusted_rand_score(classes, groups), abs=1e-9)
    wanted = normalized_mutual_info_score(classes, groups)
    if len(set(groups)) > 1 or len(set(classes)) > 1:
        assert found.nmi.value == pytest.approx(wanted, abs=1e-9)
    assert found.one_to_one.value <= found.purity.value <= 1


def test_by_hand():
    groups, classes = "aaabbb", "xxyyyy"
    found = clustering_agreement(groups, classes)
    assert found.purity.value == pytest.approx(5 / 6)
    assert found.one_to_one.value == pytest.approx(5 / 6)
    assert majority_classes(groups, classes) == {"a": "x", "b": "y"}
    # Two groups of one class: pure, but only one of them can stand for it.
    found = clustering_agreement("aabb", "xxxx")
    assert found.purity.value == 1 and found.one_to_one.value == 0.5


def test_random_groups_score_as_random_and_intervals_hold_the_value():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 8, 600).astype(str)
    found = clustering_agreement(rng.integers(0, 8, 600).astype(str), classes)
    assert found.ari.ci95[0] <= 0 <= found.ari.ci95[1]
    found = clustering_agreement(["a", "b"] * 300, classes)
    assert found.nmi.value < 0.02
    partly = np.where(rng.random(600) < 0.6, classes, rng.integers(0, 8, 600).astype(str))
    for number in vars(clustering_agreement(partly, classes)).values():
        assert number.ci95[0] <= number.value <= number.ci95[1]
        assert number.ci95[1] - number.ci95[0] < 0.2


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 groups and 1 classes"):
        clustering_agreement("ab", "x")
