"""Clusters of embeddings as a spherical Gaussian mixture, and embeddings averaged with their
neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NEIGHBOURS = 10  # of a text, that its embedding is averaged with
_ROUNDS = 2
_FAR = 0.002  # share of the texts that fit no cluster
_AT_ONCE = 20_000_000  # cosines, or numbers of neighbours, that are in memory together


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
    from sklearn.cluster import KMeans

    own_MD = x_ND[rows]
    if isinstance(start, int):
        model = KMeans(start, n_init=4, random_state=seed)
    else:
        model = KMeans(len(start), init=start, n_init=1, random_state=seed)
    model.fit(own_MD)
    weights = np.bincount(model.labels_, minlength=model.n_clusters) / len(rows)
    freedom = own_MD.size - (len(weights) - 1) * own_MD.shape[1]
    variance = max(float(model.inertia_ / freedom), 1e-8)
    centers = model.cluster_centers_.astype(np.float32)
    return Mixture(centers, weights, variance, floor_of(centers, own_MD), rows)


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
