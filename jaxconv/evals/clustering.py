"""How far groups that were found agree with groups that are known, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxconv.evals.statistics import Estimate

_NORMAL = 1.959964  # quantile of 0.975


@dataclass(frozen=True)
class Agreement:
    """Attributes:
    nmi: normalized mutual information, by the mean of both entropies.
    ari: adjusted Rand index: 0 is what chance gets.
    purity: share of the things that are in the group's most frequent class.
    one_to_one: share that is right when each group stands for one class and each class for one
        group, in the best way (Kuhn 1955).
    """

    nmi: Estimate
    ari: Estimate
    purity: Estimate
    one_to_one: Estimate


def clustering_agreement(groups: Sequence[str], classes: Sequence[str]) -> Agreement:
    """Compares groups with classes of the same things.

    Intervals are normal ones with the jackknife's deviation over the things (Efron and Stein 1981).
    A bootstrap would draw things twice, which looks like agreement.

    Raises:
        ValueError: lengths that differ, or fewer than two things.
    """
    if len(groups) != len(classes) or len(groups) < 2:
        raise ValueError(f"{len(groups)} groups and {len(classes)} classes; at least 2, as many")
    counts = contingency(groups, classes)
    n = int(counts.sum())
    values = np.array(_all(counts))
    cells = np.flatnonzero(counts)
    without = np.empty((len(cells), len(values)))  # one thing of a cell, which are all alike
    for row, cell in enumerate(cells):
        table = counts.copy()
        table.ravel()[cell] -= 1
        without[row] = _all(table)
    share = counts.ravel()[cells, None] / n
    spread = (share * (without - (share * without).sum(0)) ** 2).sum(0)
    half = _NORMAL * np.sqrt((n - 1) * spread)
    return Agreement(
        *(
            Estimate(float(v), (float(v - h), float(v + h)), n, unit)
            for v, h, unit in zip(values, half, ("NMI", "ARI", "rate", "rate"), strict=True)
        )
    )


def contingency(groups: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """int64 [groups, classes], how many things are in both; both in the order of their names."""
    _, rows = np.unique(list(groups), return_inverse=True)
    _, columns = np.unique(list(classes), return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def majority_classes(groups: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """The most frequent class of each group; of several the first by name."""
    names = sorted(set(groups)), sorted(set(classes))
    counts = contingency(groups, classes)
    return {group: names[1][int(row.argmax())] for group, row in zip(names[0], counts, strict=True)}


def _all(counts: np.ndarray) -> tuple[float, float, float, float]:
    n = counts.sum()
    a, b = counts.sum(1), counts.sum(0)
    entropies = _entropy(a / n), _entropy(b / n)
    mutual = entropies[0] + entropies[1] - _entropy(counts.ravel() / n)
    mean = sum(entropies) / 2
    nmi = max(mutual, 0.0) / mean if mean > 1e-12 else 1.0
    return nmi, _ari(counts, a, b, n), counts.max(1).sum() / n, _one_to_one(counts) / n


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _ari(counts: np.ndarray, a: np.ndarray, b: np.ndarray, n: float) -> float:
    def pairs(x):
        return float((x * (x - 1.0)).sum() / 2)

    together, first, second, all_pairs = pairs(counts), pairs(a), pairs(b), n * (n - 1) / 2
    chance = first * second / max(all_pairs, 1.0)
    most = (first + second) / 2
    return (together - chance) / (most - chance) if abs(most - chance) > 1e-12 else 1.0


def _one_to_one(counts: np.ndarray) -> float:
    from scipy.optimize import linear_sum_assignment

    return float(counts[linear_sum_assignment(-counts)].sum())
