"""Agreement against its definition, and with many labels."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from jaxconv.evals.agreement import agreement


def kappa_by_definition(given, reference) -> float:
    n = len(given)
    observed = sum(g == r for g, r in zip(given, reference, strict=True)) / n
    left, right = Counter(given), Counter(reference)
    chance = sum(left[name] * right[name] for name in left) / n**2
    return (observed - chance) / (1 - chance)


@pytest.mark.parametrize("labels", [2, 17])
def test_kappa_is_that_of_its_definition(labels):
    rng = np.random.default_rng(labels)
    reference = [f"label {i}" for i in rng.integers(0, labels, 200)]
    given = [r if rng.random() < 0.6 else f"label {rng.integers(0, labels + 1)}" for r in reference]
    found = agreement(given, reference, seed=0)
    assert found.kappa.value == pytest.approx(kappa_by_definition(given, reference))
    # The bootstrap over rows, drawn one by one.
    both = np.array([reference, given])
    drawn = []
    for _ in range(200):
        r, g = both[:, rng.integers(0, 200, 200)].tolist()
        drawn.append(kappa_by_definition(g, r))
    assert found.kappa.ci95 == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.04)
    assert agreement(given, reference, seed=0) == found


def test_one_label_on_both_sides_is_all_chance_and_agrees():
    found = agreement(["a"] * 5, ["a"] * 5, seed=0)
    assert found.kappa.value == 1.0 and found.kappa.ci95 == (1.0, 1.0)
    none = agreement(["a"] * 5, ["b"] * 5, seed=0)
    assert none.kappa.value == none.accuracy.value == 0.0 and none.confusions == (("b", "a", 5),)


def test_many_labels_take_little_memory():
    reference = [f"label {i % 400}" for i in range(1200)]
    given = [f"label {i % 399}" for i in range(1200)]
    tracemalloc.start()
    try:
        agreement(given, reference, seed=0)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 200e6  # all draws of all pairs of labels would be 2.6e9


def test_nothing_labelled_is_refused():
    with pytest.raises(ValueError, match="nothing is labelled"):
        agreement([None], ["a"], seed=0)
    with pytest.raises(ValueError, match="1 labels and 2 reference labels"):
        agreement(["a"], ["a", "b"], seed=0)
