"""Heads on embeddings: what they learn, how sure they are, and clusters."""

import dataclasses

import numpy as np
import pytest

from jaxconv.errors import Refused
from jaxconv.models.classifier import Clusters, calibration_error
from jaxconv.train.classifiers import MLPSettings, fit_classifier
from jaxconv.train.clusters import fit_clusters

CENTERS = np.random.default_rng(7).normal(size=(4, 8))


def blobs(n, labels=4, spread=0.6, seed=0):
    """Embeddings around one center a label, and the labels."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, labels, n)
    x = CENTERS[which] + spread * rng.normal(size=(n, 8))
    return x.astype(np.float32), [f"label {i}" for i in which]


@pytest.mark.parametrize("method", ["logistic", "mlp"])
@pytest.mark.parametrize("labels", [2, 4])
def test_a_head_labels_what_it_has_not_seen(method, labels):
    fitted = fit_classifier(*blobs(400, labels), method=method)
    x, truth = blobs(1000, labels, seed=1)
    head = fitted.classifier
    assert head.labels == tuple(f"label {i}" for i in range(labels))
    right = np.mean([a == b for a, b in zip(head.predict(x), truth, strict=True)])
    nearest = np.linalg.norm(x[:, None] - CENTERS[:labels], axis=2).argmin(1)  # none does better
    best = np.mean([f"label {i}" == b for i, b in zip(nearest, truth, strict=True)])
    assert right > best - 0.02 > 0.9
    probabilities = head.probabilities(x)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert fitted.kept_apart == pytest.approx(80, abs=2)


def test_logistic_regression_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, truth = blobs(300)
    head = fit_classifier(x, truth, keep_apart=0.01).classifier
    scores = head.scores(x)
    # All but one example of each label: nearly the whole set.
    peer = LogisticRegression(C=10.0, max_iter=1000).fit(x, truth)
    assert np.corrcoef(scores.ravel(), peer.decision_function(x).ravel())[0, 1] > 0.999


def test_calibration_makes_an_overfitted_head_less_sure():
    x, truth = blobs(300, spread=2.5)
    fitted = fit_classifier(x, truth, inverse_penalty=1e4, keep_apart=0.5)
    slope = fitted.classifier.slope
    assert (slope == slope[0]).all() and slope[0] < 0.95
    fresh, fresh_truth = blobs(3000, spread=2.5, seed=1)
    head = fitted.classifier

    def error(slope):
        p = dataclasses.replace(head, slope=slope).probabilities(fresh)
        said = [head.labels[i] for i in p.argmax(1)]
        right = np.array([a == b for a, b in zip(said, fresh_truth, strict=True)])
        return calibration_error(p.max(1), right)

    assert error(slope) < error(np.ones_like(slope))


def test_the_mlp_stops_early_and_learns_what_a_line_cannot():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(1500, 2)).astype(np.float32)
    truth = ["same" if a else "different" for a in x[:, 0] * x[:, 1] > 0]
    settings = MLPSettings(hidden=32, epochs=300, patience=8, learning_rate=1e-2)
    fitted = fit_classifier(x, truth, method="mlp", mlp=settings)
    assert fitted.accuracy > 0.93 > 0.7 > fit_classifier(x, truth).accuracy
    assert 8 < fitted.epochs < 300
    again = fit_classifier(x, truth, method="mlp", mlp=settings)
    np.testing.assert_array_equal(again.classifier.kernels[0], fitted.classifier.kernels[0])


@pytest.mark.parametrize("method", ["logistic", "mlp"])
def test_several_labels_a_text(method):
    rng = np.random.default_rng(0)

    def draw(n):
        x = rng.normal(size=(n, 6)).astype(np.float32)
        signs = x[:, :3] + 0.3 * rng.normal(size=(n, 3)) > 0.5
        return x, [tuple(np.array(["a", "b", "c"])[row]) for row in signs]

    fitted = fit_classifier(*draw(800), method=method)
    assert fitted.classifier.multilabel and fitted.accuracy > 0.85
    assert fitted.calibration_error < 0.1
    x, truth = draw(2000)
    found = fitted.classifier.predict(x)
    assert {len(labels) for labels in found} >= {0, 1, 2}
    agree = [set(a) == set(b) for a, b in zip(found, truth, strict=True)]
    assert np.mean(agree) > 0.6
    share = fitted.classifier.probabilities(x).mean(0)
    counts = [np.mean([name in own for own in truth]) for name in "abc"]
    np.testing.assert_allclose(share, counts, atol=0.05)


def test_clusters_are_those_of_scikit_learn():
    x, truth = blobs(300, spread=0.2)
    clusters = fit_clusters(x, 4, seed=3)
    found = clusters.assign(x)
    pairs = set(zip(truth, found.tolist(), strict=True))
    assert len(pairs) == 4
    nearest = np.linalg.norm(x[:, None] - clusters.centers, axis=2).argmin(1)
    np.testing.assert_array_equal(found, nearest)
    assert Clusters(clusters.centers).assign(x[:0]).shape == (0,)
    with pytest.raises(Refused, match="count is 301; it may be 1 to the 300"):
        fit_clusters(x, 301)


def test_calibration_error_by_hand():
    said = np.array([0.9, 0.9, 0.9, 0.9, 0.6])
    right = np.array([True, True, True, False, False])
    assert calibration_error(said, right, bins=10) == pytest.approx((abs(3.6 - 3) + 0.6) / 5)


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        (["a", "b"], {}, "2 labels for 4 embeddings"),
        (["a"] * 4, {}, "labels are a; there must be at least two"),
        (["a", "a", "a", "b"], {}, "label 'b' has 1 example"),
        (["a", "a", "b", "b"], {"method": "svm"}, "method is 'svm'; it may be logistic, mlp"),
        (["a", "a", "b", "b"], {"keep_apart": 1.0}, "keep_apart is 1.0"),
    ],
)
def test_what_cannot_be_learned_is_refused(labels, options, said):
    with pytest.raises(Refused, match=said):
        fit_classifier(np.eye(4, dtype=np.float32), labels, **options)
