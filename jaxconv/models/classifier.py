"""Labels and clusters from embeddings: small heads that are fitted once and label at any rate.

`train/classifiers.py` and `train/clusters.py` fit them. Suffixes: N texts, D width of an embedding,
F width of the hidden layer, C labels, K clusters.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxconv.errors import Refused

_AT_ONCE = 16384  # texts whose distances are in memory together


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A linear head, or one with a hidden layer, whose probabilities are calibrated.

    Attributes:
        labels: name of each label.
        multilabel: whether a text may have any number of labels; each has a probability of its own
            then, and otherwise they sum to 1.
        kernels: float32 [D, C]; or [D, F] and [F, C], with a ReLU between.
        biases: float32 [C]; or [F] and [C].
        slope, shift: float32 [C]; probabilities are those of slope * score + shift. With one label
            a text all slopes are the same, the inverse of a temperature, and the shifts are 0.
        method: "logistic" or "mlp", how it was fitted.
    """

    labels: tuple[str, ...]
    multilabel: bool
    kernels: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    slope: np.ndarray
    shift: np.ndarray
    method: str

    @property
    def width(self) -> int:
        """Numbers of the embeddings that it reads."""
        return self.kernels[0].shape[0]

    def probabilities(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 [N, C] of embeddings [N, D]."""
        return calibrated(self.scores(embeddings), self.slope, self.shift, self.multilabel)

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 [N, C] before calibration."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise Refused(f"embeddings have shape {embeddings.shape}; it must be (N, {self.width})")
        x = embeddings
        for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            x = (np.maximum(x, 0.0) if i else x) @ kernel + bias
        return x

    def predict(self, embeddings: np.ndarray) -> list[str] | list[tuple[str, ...]]:
        """The most probable label of each text; of a multilabel head all of at least one half."""
        return self.named(self.probabilities(embeddings))

    def named(self, probabilities: np.ndarray) -> list[str] | list[tuple[str, ...]]:
        """The labels that probabilities [N, C] stand for."""
        if not self.multilabel:
            return [self.labels[i] for i in probabilities.argmax(axis=1)]
        return [tuple(self.labels[i] for i in np.flatnonzero(row >= 0.5)) for row in probabilities]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Attributes:
    centers: float32 [K, D].
    """

    centers: np.ndarray

    def assign(self, embeddings: np.ndarray) -> np.ndarray:
        """int64 [N], the nearest center of embeddings [N, D]."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.centers.shape[1]:
            raise Refused(
                f"embeddings have shape {embeddings.shape}; it must be (N, {self.centers.shape[1]})"
            )
        half = 0.5 * np.sum(self.centers**2, axis=1)
        parts = range(0, len(embeddings), _AT_ONCE)
        found = [
            np.argmax(embeddings[i : i + _AT_ONCE] @ self.centers.T - half, axis=1) for i in parts
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)


def calibrated(
    scores: np.ndarray, slope: np.ndarray, shift: np.ndarray, multilabel: bool
) -> np.ndarray:
    """float32 probabilities [N, C] of scores [N, C]."""
    scores = scores * slope + shift
    if multilabel:
        return (0.5 * (1.0 + np.tanh(0.5 * scores))).astype(np.float32)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


def calibration_error(probabilities: np.ndarray, right: np.ndarray, *, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al. 2015): by how much stated probabilities miss the
    share that is right, over equal bins and weighted by how many fall into each.

    Args:
        probabilities: [N] of what was predicted.
        right: bool [N], whether it was right.
        bins: of equal width in [0, 1].
    """
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [abs((probabilities[which == b] - right[which == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / max(len(probabilities), 1))


def label_matrix(
    labels: Sequence[str] | Sequence[Sequence[str]], known: Sequence[str]
) -> np.ndarray:
    """bool [N, C] of one label or several a text; Refused for one that is not known."""
    place = {label: i for i, label in enumerate(known)}
    out = np.zeros((len(labels), len(known)), bool)
    for row, own in enumerate(labels):
        for label in (own,) if isinstance(own, str) else own:
            if label not in place:
                raise Refused(f"row {row}: label is {label!r}; it may be {', '.join(known)}")
            out[row, place[label]] = True
    return out
