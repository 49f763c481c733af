"""Precision, recall and F1 of labels that were predicted several times, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxconv.evals.statistics import Estimate, with_repetitions

_RESAMPLES = 2000
_AT_ONCE = 2_000_000  # numbers of a bootstrap in memory together


@dataclass(frozen=True)
class Scores:
    """Means over splits. Intervals are percentiles of a bootstrap over the labelled things, each of
    which is drawn with all that was predicted for it, widened by how much splits differ: what was
    learned in each is drawn too.

    Attributes:
        accuracy: share that is right.
        balanced: mean over labels of the share of each that is right; 1 / labels is what guessing
            gets, however uneven they are.
        precision, recall, f1: of each label, weighted by how often it is the right one.
    """

    accuracy: Estimate
    balanced: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate


def weighted_scores(
    predicted: Sequence[Sequence[str | None]], truth: Sequence[str], *, seed: int
) -> Scores:
    """Scores of predictions in one or several splits.

    Args:
        predicted: of each split, a label for each thing; None where it was not predicted there:
            that counts for nothing, least of all as a label.
        truth: right label of each thing.
        seed: of the bootstrap.

    Raises:
        ValueError: lengths that differ, or a split without a prediction.
    """
    if any(len(labels) != len(truth) for labels in predicted):
        raise ValueError(f"there are {len(truth)} right labels; every split needs as many entries")
    names = sorted({*truth, *(label for split in predicted for label in split if label)})
    number = {name: i for i, name in enumerate(names)}
    k, n = len(names), len(truth)
    cells_SN = np.array(
        [
            [-1 if label is None else number[right] * k + number[label] for label, right in pairs]
            for pairs in (zip(labels, truth, strict=True) for labels in predicted)
        ]
    ).reshape(len(predicted), n)
    if not len(cells_SN) or np.any((cells_SN >= 0).sum(axis=1) == 0):
        raise ValueError("a split has no prediction")
    used_N = np.flatnonzero((cells_SN >= 0).any(axis=0))
    cells_SN = cells_SN[:, used_N]
    # Things with the same cells in all splits are alike to a bootstrap: it draws how many of each.
    cells_SU, count_U = np.unique(cells_SN, axis=1, return_counts=True)
    onehot_SUC = (cells_SU[..., None] == np.arange(k * k)).astype(np.float32)
    rng = np.random.default_rng(seed)
    m = len(used_N)
    at_once = max(1, _AT_ONCE // len(count_U))
    drawn = [
        _scores(_summed(rng.multinomial(m, count_U / m, size=size), onehot_SUC), k)
        for size in _parts(_RESAMPLES, at_once)
    ]
    means = np.concatenate([scores.mean(axis=1) for scores in drawn], axis=1)
    low_high = np.nanquantile(means, (0.025, 0.975), axis=1)
    values_5S = _scores(_summed(count_U[None], onehot_SUC), k)[..., 0]
    return Scores(
        *(
            with_repetitions(
                Estimate(float(own_S.mean()), (float(low), float(high)), m, "rate"),
                own_S,
                within=(0.0, 1.0),
            )
            for own_S, low, high in zip(values_5S, *low_high, strict=True)
        )
    )


def _parts(total: int, most: int) -> list[int]:
    return [min(most, total - done) for done in range(0, total, most)]


def _summed(weights_BU: np.ndarray, onehot_SUC: np.ndarray) -> np.ndarray:
    """float64 [S, B, C]."""
    return np.stack([weights_BU @ onehot_UC for onehot_UC in onehot_SUC]).astype(np.float64)


def _scores(counts_SBC: np.ndarray, k: int) -> np.ndarray:
    """float64 [5, S, B]: accuracy, balanced accuracy, precision, recall, F1 of each split."""
    table = counts_SBC.reshape(*counts_SBC.shape[:-1], k, k)  # right label, predicted label
    hit, right, said = np.einsum("...ii->...i", table), table.sum(-1), table.sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = right / right.sum(-1, keepdims=True)
        precision = np.where(said > 0, hit / said, 0.0)
        recall = np.where(right > 0, hit / right, 0.0)
        f1 = np.where(right + said > 0, 2 * hit / (right + said), 0.0)
        accuracy = hit.sum(-1) / right.sum(-1)
        balanced = recall.sum(-1) / (right > 0).sum(-1)
    weighted = [(share * x).sum(-1) for x in (precision, recall, f1)]
    return np.stack([accuracy, balanced, *weighted])
