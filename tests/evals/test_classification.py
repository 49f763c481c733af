"""Weighted scores against scikit-learn, over splits, with what was not predicted left out."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support

from jaxconv.evals.classification import weighted_scores

LABELS = st.sampled_from("abc")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(LABELS, LABELS), min_size=3, max_size=30))
def test_one_split_equals_scikit_learn(pairs):
    truth, said = zip(*pairs, strict=True)
    found = weighted_scores([said], truth, seed=0)
    wanted = precision_recall_fscore_support(truth, said, average="weighted", zero_division=0)[:3]
    values = (found.precision.value, found.recall.value, found.f1.value)
    assert values == pytest.approx(wanted)
    assert found.accuracy.value == pytest.approx(np.mean(np.array(truth) == np.array(said)))
    assert found.accuracy.n == len(pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label that is said and never right
        assert found.balanced.value == pytest.approx(balanced_accuracy_score(truth, said))
    for score in (found.accuracy, found.balanced, found.precision, found.recall, found.f1):
        assert 0 <= score.ci95[0] <= score.ci95[1] <= 1


def test_splits_are_averaged_and_missing_predictions_are_no_label():
    truth = ["a", "a", "b", "b", "a"]
    found = weighted_scores(
        [["a", None, "b", "a", None], [None, "a", "b", None, None]], truth, seed=0
    )
    assert found.accuracy.value == pytest.approx((2 / 3 + 1) / 2)
    assert found.accuracy.n == 4  # the last thing was predicted in no split
    with pytest.raises(ValueError, match="a split has no prediction"):
        weighted_scores([[None] * 5], truth, seed=0)
    with pytest.raises(ValueError, match="5 right labels"):
        weighted_scores([["a"]], truth, seed=0)


def test_splits_of_the_same_things_do_not_make_the_interval_narrower():
    rng = np.random.default_rng(0)
    truth = ["a" if x else "b" for x in rng.random(200) < 0.5]
    said = [t if x else "a" for t, x in zip(truth, rng.random(200) < 0.7, strict=True)]
    once = weighted_scores([said], truth, seed=0).accuracy
    five = weighted_scores([said] * 5, truth, seed=0).accuracy
    assert five.ci95 == pytest.approx(once.ci95) and five.value == pytest.approx(once.value)
    width = once.ci95[1] - once.ci95[0]
    share = once.value
    assert width == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 200), rel=0.1)
