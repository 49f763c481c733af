"""What a rubric's scores come to, and what its items are worth: each against the labels, and as
small classifiers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxconv.evals.statistics import Estimate
from jaxconv.models.classifier import Classifier
from jaxconv.recipes.spur_tasks import DSAT, SAT, ItemScores, NumberedItem
from jaxconv.train.classifiers import fit_classifier

_LEAST = 5  # conversations that show an item, and do not, in each half, for it to be distilled
_RESAMPLES = 500


def points_of(
    scores: Mapping[str, ItemScores], ids: Sequence[str], items: Sequence[NumberedItem]
) -> np.ndarray:
    """int8 [ids, items], from 0 to 10; -1 in the row of a conversation without scores."""
    out_NI = np.full((len(ids), len(items)), -1, np.int8)
    place = {item.id: i for i, item in enumerate(items)}
    for row, id in enumerate(ids):
        for item in scores[id].items if id in scores else ():
            out_NI[row, place[item.id]] = item.score
    return out_NI


def satisfaction_of(points_NI: np.ndarray, items: Sequence[NumberedItem]) -> list[int | None]:
    """R of each conversation; None without scores."""
    signs = np.array([1 if item.id.startswith("S") else -1 for item in items])
    known = (points_NI >= 0).all(axis=1)
    return [int(r) if k else None for r, k in zip(points_NI @ signs, known, strict=True)]


def balanced_accuracy(said: Sequence[str | None], truth: Sequence[str]) -> float | None:
    """Mean of the shares of SAT and of DSAT that are said to be so: 0.5 is what guessing gets,
    however uneven the labels are. None where one of both has no prediction."""
    shares = []
    for label in (SAT, DSAT):
        own = [a == label for a, b in zip(said, truth, strict=True) if b == label and a is not None]
        if not own:
            return None
        shares.append(np.mean(own))
    return float(np.mean(shares))


@dataclass(frozen=True)
class ItemTest:
    """How an item goes with satisfaction.

    Attributes:
        sat, dsat: shares of satisfied and dissatisfied users who show it.
        shown: conversations that show it.
        chi_square: Pearson's, one degree of freedom, without a continuity correction.
        p: of independence, corrected for all items (Holm 1979); 1 where nobody or everybody shows
            the item.
    """

    sat: float
    dsat: float
    shown: int
    chi_square: float
    p: float


def item_tests(shown_NI: np.ndarray, satisfied_N: np.ndarray) -> list[ItemTest]:
    """A test for each item.

    Args:
        shown_NI: bool, whether a conversation shows an item.
        satisfied_N: bool.
    """
    from scipy import stats

    found = []
    for shown_N in shown_NI.T:
        cells = np.array(
            [[np.sum(shown_N[satisfied_N == s] == x) for x in (True, False)] for s in (True, False)]
        )
        if (cells.sum(0) > 0).all() and (cells.sum(1) > 0).all():
            result = stats.chi2_contingency(cells, correction=False)
            chi, p = float(result.statistic), float(result.pvalue)
        else:
            chi, p = 0.0, 1.0
        sat, dsat = cells[:, 0] / np.maximum(cells.sum(1), 1)
        found.append((float(sat), float(dsat), int(shown_N.sum()), chi, p))
    corrected = holm([p for *_, p in found])
    return [ItemTest(*rest, p) for (*rest, _), p in zip(found, corrected, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order (Holm 1979)."""
    out, highest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        out[i] = highest
    return out


@dataclass(frozen=True)
class Distilled:
    """Classifiers of embeddings that say which items a conversation shows.

    Attributes:
        classifier: of all items, fitted on every conversation; None where no item is shown often
            enough.
        auc: of each item that was distilled, on the half that it was not fitted on, by its id.
        mean_auc: of these, with an interval over conversations; None where there is none.
    """

    classifier: Classifier | None
    auc: Mapping[str, float]
    mean_auc: Estimate | None


def distil(
    points_NI: np.ndarray, items: Sequence[NumberedItem], embeddings: np.ndarray, *, seed: int
) -> Distilled:
    """One logistic regression for each item, on embeddings.

    Args:
        points_NI: as `points_of` gives them.
        items: of the rubrics, in their order.
        embeddings: float32 [N, D].
        seed: of the halves.

    Raises:
        Failed: a logistic regression does not converge.
    """
    known = np.flatnonzero((points_NI >= 0).all(axis=1))
    shown_NI = points_NI[known] > 0
    half = np.random.default_rng(seed).permutation(len(known)) % 2 == 0
    parts = (shown_NI[half], shown_NI[~half])
    counts = np.min([np.minimum(x.sum(0), (~x).sum(0)) for x in parts], axis=0)
    kept = [k for k in range(len(items)) if counts[k] >= _LEAST]
    if not kept:
        return Distilled(None, {}, None)
    names = [items[k].id for k in kept]
    x_ND = embeddings[known]

    def fit(rows: np.ndarray) -> Classifier:
        labels = [
            tuple(name for name, k in zip(names, kept, strict=True) if row[k])
            for row in shown_NI[rows]
        ]
        return fit_classifier(x_ND[rows], labels, seed=seed).classifier

    first = fit(half)
    place = [first.labels.index(name) for name in names]
    said_NK = first.probabilities(x_ND[~half])[:, place]
    truth_NK = shown_NI[~half][:, kept]
    auc = _auc(said_NK, truth_NK)
    rng = np.random.default_rng(seed)
    n = len(said_NK)
    drawn = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, n, n)
        drawn.append(np.nanmean(_auc(said_NK[rows], truth_NK[rows])))
    low, high = np.quantile(drawn, (0.025, 0.975))
    mean = Estimate(float(np.mean(auc)), (float(low), float(high)), n, "AUC")
    return Distilled(
        fit(np.ones(len(known), bool)),
        dict(zip(names, map(float, auc), strict=True)),
        mean,
    )


def _auc(said_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """float64 [K]: how often one that shows an item is above one that does not, a tie as a half
    (Mann and Whitney 1947); NaN where one of both is missing."""
    from scipy.stats import rankdata

    ranks = rankdata(said_NK, axis=0)
    yes = truth_NK.sum(0)
    no = len(truth_NK) - yes
    above = (ranks * truth_NK).sum(0) - yes * (yes + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((yes > 0) & (no > 0), above / (yes * no), np.nan)


def satisfied_of(truth: Sequence[str]) -> np.ndarray:
    """bool [N]."""
    return np.array([label == SAT for label in truth])
