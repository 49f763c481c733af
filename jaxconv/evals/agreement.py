"""How far two labellers agree, with intervals over the labelled things."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxconv.evals.statistics import Estimate, proportion

_RESAMPLES = 2000
_NUMBERS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap to some tens of megabytes


@dataclass(frozen=True)
class Agreement:
    """Labels against labels for the same things.

    Attributes:
        coverage: share of the things that got a label at all.
        accuracy: share of the labelled things on which both agree.
        kappa: Cohen's, of the labelled things; bootstrap interval.
        majority: what always giving the reference's most frequent label agrees on.
        confusions: (reference, given, how often) where they differ, the most frequent first.
    """

    coverage: Estimate
    accuracy: Estimate
    kappa: Estimate
    majority: Estimate
    confusions: tuple[tuple[str, str, int], ...]


def agreement(given: Sequence[str | None], reference: Sequence[str], *, seed: int) -> Agreement:
    """Compares labels with reference labels.

    Args:
        given: None where there is no label: these count for `coverage` alone and are never taken
            for a label.
        reference: one for each.
        seed: of the bootstrap.

    Raises:
        ValueError: lengths that differ, or nothing that is labelled.
    """
    if len(given) != len(reference):
        raise ValueError(f"{len(given)} labels and {len(reference)} reference labels")
    pairs = [(r, g) for g, r in zip(given, reference, strict=True) if g is not None]
    if not pairs:
        raise ValueError("nothing is labelled")
    n = len(pairs)
    cells = Counter(pairs)
    kappa, (low, high) = _kappa_with_interval(cells, seed)
    confused = {pair: count for pair, count in cells.items() if pair[0] != pair[1]}
    return Agreement(
        coverage=proportion(n, len(given)),
        accuracy=proportion(n - sum(confused.values()), n),
        kappa=Estimate(kappa, (low, high), n, "kappa"),
        majority=proportion(max(Counter(r for r, _ in pairs).values()), n),
        confusions=tuple(
            (r, g, count)
            for (r, g), count in sorted(confused.items(), key=lambda item: (-item[1], item[0]))
        ),
    )


def _kappa_with_interval(
    cells: Mapping[tuple[str, str], int], seed: int
) -> tuple[float, tuple[float, float]]:
    """Cohen's kappa of counted (reference, given) pairs. Only pairs that occur are drawn, and few
    draws at a time: most of a large table is empty."""
    pairs = sorted(cells)
    names = sorted({name for pair in pairs for name in pair})
    number = {name: i for i, name in enumerate(names)}
    places_2K = np.array([[number[name] for name in pair] for pair in pairs]).T
    counts_K = np.array([cells[pair] for pair in pairs])
    n, rng = counts_K.sum(), np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // (len(pairs) + len(names)))
    kappas = np.concatenate(
        [
            _kappa(rng.multinomial(n, counts_K / n, min(at_once, _RESAMPLES - done)), places_2K)
            for done in range(0, _RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(kappas, (0.025, 0.975))
    return float(_kappa(counts_K[None], places_2K)[0]), (float(low), float(high))


def _kappa(counts_BK: np.ndarray, places_2K: np.ndarray) -> np.ndarray:
    """float64 [B], of counts of K pairs, whose two labels have the numbers `places_2K`. Where
    chance explains all (one label on both sides) it is 1."""
    n = counts_BK[0].sum()
    observed = counts_BK[:, places_2K[0] == places_2K[1]].sum(1) / n
    reference_BL, given_BL = (_summed(counts_BK, places_K) for places_K in places_2K)
    shared = min(reference_BL.shape[1], given_BL.shape[1])
    chance = (reference_BL[:, :shared] * given_BL[:, :shared]).sum(1) / n**2
    left = 1 - chance
    return np.where(left > 1e-12, (observed - chance) / np.maximum(left, 1e-12), 1.0)


def _summed(counts_BK: np.ndarray, places_K: np.ndarray) -> np.ndarray:
    """float64 [B, L]: the counts of the pairs with each label."""
    order_K = np.argsort(places_K, kind="stable")
    labels, firsts = np.unique(places_K[order_K], return_index=True)
    out_BL = np.zeros((len(counts_BK), labels[-1] + 1))
    out_BL[:, labels] = np.add.reduceat(counts_BK[:, order_K], firsts, axis=1)
    return out_BL
