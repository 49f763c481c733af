"""Estimates with 95 % intervals, resampled over the independent unit.

The independent unit is what was drawn independently: an episode, a conversation, an author. Turns
of one episode, or the seats of one game, rise and fall together; resampling them one by one gives
intervals that are too narrow. Every function here takes one number a unit, or says with `clusters`
which numbers belong to one unit; `n` is always the number of units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap to some tens of megabytes


@dataclass(frozen=True)
class Estimate:
    """A measured number. `dataclasses.asdict` of it is JSON-able.

    value: the point estimate.
    ci95: lower and upper end of its 95 % interval; None only for a number that is not a sample.
    n: independent units it rests on.
    unit: what `value` is measured in, such as "score" or "rate".
    """

    value: float
    ci95: tuple[float, float] | None
    n: int
    unit: str

    def __str__(self) -> str:
        if self.ci95 is None:
            return f"{self.value:.4g} {self.unit} (n={self.n})"
        low, high = self.ci95
        return f"{self.value:.4g} [{low:.4g}, {high:.4g}] {self.unit} (n={self.n})"


def bootstrap_mean(
    values: ArrayLike,
    *,
    seed: int,
    unit: str,
    clusters: Sequence | np.ndarray | None = None,
    resamples: int = 5000,
) -> Estimate:
    """Mean with a bias-corrected and accelerated bootstrap interval (Efron 1987).

    Args:
        values: [M] finite numbers.
        seed: of the resampling; the same seed gives the same interval.
        unit: what the values are measured in.
        clusters: [M] labels; values with one label form one independent unit and are drawn
            together. The estimate stays the mean over all values. None: each value is a unit.
        resamples: bootstrap draws.

    Returns:
        The estimate. Where all units agree the interval has no width: for a rate near 0 or 1 this
        claims too much, use `proportion`.

    Raises:
        ValueError: fewer than two units, a value that is not finite, or shapes that do not fit.
    """
    totals, counts = _units(values, clusters)
    return _bootstrap_ratio(totals, counts, seed=seed, unit=unit, resamples=resamples)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    unit: str,
    clusters: Sequence | np.ndarray | None = None,
    resamples: int = 5000,
) -> Estimate:
    """Mean of a − b, where a[i] and b[i] were measured on the same unit (the same seeds, say).

    Arguments, result and errors as in `bootstrap_mean`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b has shape {b.shape}; pairs need the same")
    return bootstrap_mean(a - b, seed=seed, unit=unit, clusters=clusters, resamples=resamples)


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    seed: int,
    unit: str,
    resamples: int = 5000,
) -> Estimate:
    """Σ numerator / Σ denominator over units, such as invalid turns per turn over episodes.

    Both [n], one entry a unit; denominators at least 0, with two or more above 0. Units without
    anything in the denominator are left out. Result and errors as in `bootstrap_mean`.
    """
    numerators, denominators = (
        _numbers("numerators", numerators),
        _numbers("denominators", denominators),
    )
    if numerators.shape != denominators.shape:
        raise ValueError(
            f"numerators have shape {numerators.shape} and denominators {denominators.shape}; "
            "they must agree"
        )
    if np.any(denominators < 0):
        raise ValueError(f"a denominator is {denominators.min()}; it must be at least 0")
    used = denominators > 0
    return _bootstrap_ratio(
        numerators[used], denominators[used], seed=seed, unit=unit, resamples=resamples
    )


def proportion(successes: int, n: int, *, unit: str = "rate") -> Estimate:
    """Rate of `successes` among `n` independent units with the Wilson score interval (1927).

    It stays honest at 0 and 1, where a bootstrap has no width. Outcomes that are not independent
    (several a game) belong in `bootstrap_mean` with clusters.

    Raises:
        ValueError: n below 1, or successes outside 0..n.
    """
    if n < 1:
        raise ValueError(f"n is {n}; a proportion needs at least 1 unit")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}; it must lie between 0 and n = {n}")
    from scipy import stats

    interval = stats.binomtest(int(successes), int(n)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(successes / n, (float(interval.low), float(interval.high)), int(n), unit)


def mean_of_few(values: ArrayLike, *, unit: str) -> Estimate:
    """Mean of a few independent numbers with Student's t interval: of repetitions, say, of which
    there are too few to be resampled.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    values = _numbers("values", values)
    n = len(values)
    if n < 2:
        raise ValueError(f"there are {n} values; an interval needs at least 2")
    from scipy import stats

    mean = float(values.mean())
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, (mean - half, mean + half), n, unit)


def with_repetitions(
    estimate: Estimate, values: ArrayLike, *, within: tuple[float, float]
) -> Estimate:
    """An estimate whose interval is over units, widened by how much repetitions of it differ: the
    variances of both add up (units and repetitions are drawn apart).

    Args:
        estimate: of the mean over repetitions, which all measure the same units.
        values: of each repetition; a single one widens nothing.
        within: the least and the largest that it can be.
    """
    if len(values) < 2:
        return estimate
    low, high = mean_of_few(values, unit=estimate.unit).ci95
    half, value = (high - low) / 2, estimate.value
    ends = (
        max(value - float(np.hypot(value - estimate.ci95[0], half)), within[0]),
        min(value + float(np.hypot(estimate.ci95[1] - value, half)), within[1]),
    )
    return Estimate(value, ends, estimate.n, estimate.unit)


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}; it must be one-dimensional")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} holds {int(np.sum(~np.isfinite(values)))} non-finite entries")
    return values


def _units(values: ArrayLike, clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the values of each independent unit."""
    values = _numbers("values", values)
    if clusters is None:
        return values, np.ones_like(values)
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(f"clusters have shape {labels.shape} and values {values.shape}")
    _, index = np.unique(labels, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def _bootstrap_ratio(
    totals: np.ndarray, counts: np.ndarray, *, seed: int, unit: str, resamples: int
) -> Estimate:
    """Σ totals / Σ counts, resampling units."""
    n = len(totals)
    if n < 2:
        raise ValueError(f"there are {n} independent units; an interval needs at least 2")
    value = float(totals.sum() / counts.sum())
    rates = totals / counts
    if np.ptp(rates) <= 1e-12 * np.max(np.abs(rates)):  # only rounding: acceleration is 0 / 0
        return Estimate(value, (value, value), n, unit)
    from scipy import stats

    # BCa takes third powers, which vanish for small numbers. A power of two rounds nothing.
    scale = np.exp2(np.frexp(np.max(np.abs(rates)))[1])
    interval = stats.bootstrap(
        (totals / scale, counts),
        lambda total, count, axis=-1: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWS_AT_ONCE // n),
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    ends = (float(interval.low * scale), float(interval.high * scale))
    return Estimate(value, ends, n, unit)
