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
    """

    nmi: Estimate
    ari: Estimate
    purity: Estimate


def clustering_agreement(groups: Sequence[str], classes: Sequence[str]) -> Agreement:
    """Compares groups with classes of the same things.

    Intervals are normal ones with the jackknife's deviation over the things (Efron and Stein 1981).
    A bootstrap would draw things twice, which looks like agreement.

    Raises:
        ValueError: lengths that differ, or fewer than two things.
    """
    if len(groups) != len(classes) or len(groups) < 2:
        raise ValueError(f"{len(groups)} groups and {len(classes)} classes; at least 2, as many")
    _, rows = np.unique(list(groups), return_inverse=True)
    _, columns = np.unique(list(classes), return_inverse=True)
    pairs, cells = np.unique(np.stack([rows, columns]), axis=1, return_counts=True)
    n = len(rows)
    sums = _sums(pairs, cells.astype(np.float64))
    values = np.array(_all(n, *sums[0]))
    # Without one thing of a cell, which are all alike.
    without = np.stack(_all(n - 1, *sums[1]), axis=1)
    share = cells[:, None] / n
    spread = (share * (without - (share * without).sum(0)) ** 2).sum(0)
    half = _NORMAL * np.sqrt((n - 1) * spread)
    return Agreement(
        *(
            Estimate(float(v), (max(float(v - h), least), min(float(v + h), 1.0)), n, unit)
            for v, h, unit, least in zip(
                values, half, ("NMI", "ARI", "rate"), (0.0, -1.0, 0.0), strict=True
            )
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


def _sums(pairs_2C: np.ndarray, cells_C: np.ndarray):
    """What all measures are made of, with everything and without one thing of each cell.

    Of cells, groups and classes the sums of x log x and of x (x - 1) / 2, and the sum over groups
    of the largest cell.
    """
    a_G = np.bincount(pairs_2C[0], cells_C)
    b_K = np.bincount(pairs_2C[1], cells_C)
    counts = (cells_C, a_G[pairs_2C[0]], b_K[pairs_2C[1]])
    whole, less = [], []
    for f in (_x_log_x, _pairs):
        for all_x, own_C in zip((cells_C, a_G, b_K), counts, strict=True):
            total = f(all_x).sum()
            whole.append(total)
            less.append(total - f(own_C) + f(own_C - 1))
    largest_G, second_G = np.zeros(len(a_G)), np.zeros(len(a_G))
    for group, count in zip(pairs_2C[0], cells_C, strict=True):
        if count > largest_G[group]:
            largest_G[group], second_G[group] = count, largest_G[group]
        else:
            second_G[group] = max(second_G[group], count)
    hits = largest_G.sum()
    own_C = largest_G[pairs_2C[0]]
    after_C = np.where(cells_C == own_C, np.maximum(second_G[pairs_2C[0]], cells_C - 1), own_C)
    return (*whole, hits), (*less, hits - own_C + after_C)


def _all(n: int, cells, a, b, cell_pairs, a_pairs, b_pairs, hits):
    """(NMI, ARI, purity) of `_sums`; n things."""
    log_n = np.log(n)
    of_cells, of_a, of_b = (log_n - x / n for x in (cells, a, b))  # entropies
    mutual, mean = np.maximum(of_a + of_b - of_cells, 0.0), (of_a + of_b) / 2
    nmi = np.where(mean > 1e-12, mutual / np.where(mean > 1e-12, mean, 1.0), 1.0)
    chance = a_pairs * b_pairs / max(_pairs(n), 1.0)
    above = (a_pairs + b_pairs) / 2 - chance
    sure = np.abs(above) <= 1e-12
    ari = np.where(sure, 1.0, (cell_pairs - chance) / np.where(sure, 1.0, above))
    return nmi, ari, hits / n


def _x_log_x(x):
    return x * np.log(np.maximum(x, 1.0))


def _pairs(x):
    return x * (x - 1.0) / 2
