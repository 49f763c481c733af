"""What rules of TnT-LLM cluster, and how: embeddings averaged with their neighbours, or words that
occur together where embeddings know no meaning; and a spherical Gaussian mixture of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_NEIGHBOURS = 10  # of a text, that its embedding is averaged with
_ROUNDS = 2
_LATENT = 100  # numbers of a text by its words
_TOKEN = r"(?u)\b[^\W\d_]{2,}\b"
_FAR = 0.002  # share of the texts that fit no cluster
_AT_ONCE = 20_000_000  # cosines, or numbers of neighbours, that are in memory together


def latent(texts: Sequence[str], among: Sequence[int], *, seed: int) -> np.ndarray:
    """Latent semantic analysis (Deerwester et al. 1990): texts whose words occur in the same texts
    are near, though they share none. For an encoder without weights, to which only what is written
    alike is near.

    Words count by the logarithm of how often a text has them, times that of how rare they are, so
    that those of every text count nothing.

    Args:
        texts: to be told apart.
        among: those that it is learned from, which those to test on are not.
        seed: of the randomized decomposition.

    Returns float32 [texts, at most 100], of unit length; zeros for texts without a word that two
    others have.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.utils.extmath import randomized_svd

    own = [texts[i] for i in among]
    counter = CountVectorizer(token_pattern=_TOKEN, min_df=min(2, len(own)))
    try:
        counts = counter.fit(own).transform(texts).astype(np.float32)
    except ValueError:  # no word is left
        return np.zeros((len(texts), 1), np.float32)
    rarity_P = np.log(len(own) / np.maximum(np.asarray((counts[among] > 0).sum(0)).ravel(), 1))
    counts.data = np.log1p(counts.data)
    counts = counts.multiply(rarity_P[None].astype(np.float32)).tocsr()
    norms_N = np.sqrt(np.asarray(counts.multiply(counts).sum(1)).ravel())
    counts = counts.multiply((1 / np.maximum(norms_N, 1e-12))[:, None]).tocsr()
    # Fewer directions than words: with as many, words that occur together stay apart.
    width = min(_LATENT, max(counts.shape[1] // 4, 1), len(own))
    _, _, directions_WP = randomized_svd(counts[among], width, random_state=seed)
    return normalized(counts @ directions_WP.T)


def smoothed(vectors_ND: np.ndarray, among: Sequence[int]) -> np.ndarray:
    """Each embedding averaged with its nearest ones, by their cosines, and of unit length.

    Neighbours mostly belong to the same cluster, and the mean has less of what only one text has.

    Args:
        vectors_ND: embeddings.
        among: rows that may be neighbours: those that tables are made from, not those to test on.
    """
    out_ND = normalized(vectors_ND)
    near = min(_NEIGHBOURS, len(among))
    for _ in range(_ROUNDS):
        known_MD, parts = out_ND[among], []
        at_once = max(_AT_ONCE // max(len(among), near * out_ND.shape[1]), 1)
        for begin in range(0, len(out_ND), at_once):
            own = out_ND[begin : begin + at_once]
            cosines = own @ known_MD.T
            nearest = np.argpartition(-cosines, near - 1, axis=1)[:, :near]
            weights = np.maximum(np.take_along_axis(cosines, nearest, axis=1), 0.0)
            parts.append(own + np.einsum("bk,bkd->bd", weights, known_MD[nearest]))
        out_ND = normalized(np.concatenate(parts))
    return out_ND


def distinct(x_ND: np.ndarray) -> int:
    """How many rows differ by more than rounding."""
    return len(np.unique(np.round(x_ND, 5), axis=0))


def normalized(vectors_ND: np.ndarray) -> np.ndarray:
    """Of unit length; zeros stay zeros."""
    norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return (vectors_ND / np.maximum(norms, 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Mixture:
    """Attributes:
    centers: float32 [K, D].
    weights: [K], sum to 1.
    variance: of every number around its center.
    floor: cosine to the nearest center below which a text is in no cluster.
    seen: rows that it was fitted to.
    """

    centers: np.ndarray
    weights: np.ndarray
    variance: float
    floor: float
    seen: np.ndarray

    def scores(self, x_ND: np.ndarray) -> np.ndarray:
        """float [N, K], log-density of each cluster but for a constant."""
        squares = (
            (x_ND**2).sum(1, keepdims=True)
            - 2 * x_ND @ self.centers.T
            + (self.centers**2).sum(1)[None]
        )
        scale = self.centers.shape[1] * np.log(self.variance) / 2
        return np.log(self.weights + 1e-12) - squares / (2 * self.variance) - scale

    def likelihood(self, x_ND: np.ndarray) -> float:
        """Mean log-density, but for a constant."""
        scores = self.scores(x_ND)
        most = scores.max(1, keepdims=True)
        return float((most[:, 0] + np.log(np.exp(scores - most).sum(1))).mean())


def fit_mixture(
    x_ND: np.ndarray, rows: np.ndarray, start: int | np.ndarray, *, seed: int
) -> Mixture:
    """k-means of these rows, from so many clusters or from centers, as a mixture."""
    own_MD = x_ND[rows]
    model = kmeans(own_MD, start, starts=4, seed=seed)
    weights = np.bincount(model.labels_, minlength=model.n_clusters) / len(rows)
    freedom = own_MD.size - (len(weights) - 1) * own_MD.shape[1]
    variance = max(float(model.inertia_ / freedom), 1e-8)
    centers = model.cluster_centers_.astype(np.float32)
    return Mixture(centers, weights, variance, floor_of(centers, own_MD), rows)


def kmeans(x_ND: np.ndarray, start: int | np.ndarray, *, starts: int, seed: int) -> Any:
    """scikit-learn's, fitted: so many clusters from the best of some starts, or from centers."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if isinstance(start, int):
        model = KMeans(start, n_init=starts, random_state=seed)
    else:
        model = KMeans(len(start), init=start, n_init=1, random_state=seed)
    with warnings.catch_warnings():
        # Texts may be equal; a cluster that gets none stays where it began.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x_ND)


def floor_of(centers_KD: np.ndarray, x_ND: np.ndarray) -> float:
    """A cosine that all but a few of these texts have to their nearest center."""
    return float(np.quantile(nearness(centers_KD, x_ND), _FAR)) - 1e-6


def nearness(centers_KD: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
    """float [N], cosine to the nearest center."""
    return (normalized(x_ND) @ normalized(centers_KD).T).max(1)


def nearest_pair(centers: np.ndarray) -> tuple[int, int]:
    near = centers @ centers.T - 0.5 * (centers**2).sum(1)[:, None] - 0.5 * (centers**2).sum(1)
    near[np.tril_indices(len(centers))] = -np.inf
    one, two = np.unravel_index(int(near.argmax()), near.shape)
    return int(one), int(two)
