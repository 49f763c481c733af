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
    assert 0 < found.purity.value <= 1


def test_by_hand():
    groups, classes = "aaabbb", "xxyyyy"
    found = clustering_agreement(groups, classes)
    assert found.purity.value == pytest.approx(5 / 6)
    assert majority_classes(groups, classes) == {"a": "x", "b": "y"}
    assert clustering_agreement("aabb", "xxxx").purity.value == 1


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), min_size=3, max_size=25)
)
def test_intervals_are_those_of_leaving_each_thing_out(pairs):
    groups, classes = zip(*pairs, strict=True)
    found, n = clustering_agreement(groups, classes), len(pairs)
    kept = [[p for k, p in enumerate(pairs) if k != i] for i in range(n)]
    without = [clustering_agreement(*zip(*own, strict=True)) for own in kept]
    for name in ("nmi", "ari", "purity"):
        values = np.array([getattr(one, name).value for one in without])
        deviation = np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())
        value, half = getattr(found, name).value, 1.959964 * deviation
        least = -1 if name == "ari" else 0
        wanted = max(value - half, least), min(value + half, 1)
        assert getattr(found, name).ci95 == pytest.approx(wanted, abs=1e-9)


def test_many_classes_of_many_things_take_no_table():
    names = [f"{i}" for i in range(50_000)]
    found = clustering_agreement([f"{i % 77}" for i in range(50_000)], names)
    assert found.purity.value == pytest.approx(77 / 50_000)


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
