"""Clusters of embeddings by k-means."""

import numpy as np

from jaxconv.errors import Refused
from jaxconv.models.classifier import Clusters

_MINI_BATCH_FROM = 50_000  # embeddings from which every step reads only some of them


def fit_clusters(embeddings: np.ndarray, count: int, *, seed: int = 0) -> Clusters:
    """k-means of scikit-learn, the best of four starts by k-means++.

    Args:
        embeddings: float32 [N, D].
        count: clusters, at most N.
        seed: of the starts.

    Raises:
        Refused: a count that there are too few embeddings for.
    """
    if not 1 <= count <= len(embeddings):
        raise Refused(f"count is {count}; it may be 1 to the {len(embeddings)} embeddings")
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = KMeans if len(embeddings) < _MINI_BATCH_FROM else MiniBatchKMeans
    found = kind(n_clusters=count, n_init=4, random_state=seed).fit(embeddings)
    return Clusters(found.cluster_centers_.astype(np.float32))
