"""An encoder without weights: hashed words and character n-grams.

It knows nothing of meaning, only of what is written alike: the default where there is no
checkpoint, and a baseline for those that there are.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxconv.errors import Refused

_WIDEST = 1 << 14
_BATCH = 4096  # texts whose n-grams are in memory together


@dataclasses.dataclass(frozen=True)
class HashedNgrams:
    """Words, pairs of words and the n-grams of 3 to 5 characters inside words, each added to one of
    `width` numbers with a sign of its own (Weinberger et al. 2009, arXiv 0902.2206), by the
    logarithm of how often it is there; of unit length.

    Attributes:
        width: numbers of an embedding.
    """

    width: int = 1024

    def __post_init__(self):
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise Refused(f"width is {self.width!r}; it must be a positive integer")
        if self.width > _WIDEST:
            raise Refused(f"width is {self.width}; it may be at most {_WIDEST}")

    @property
    def fingerprint(self) -> str:
        """Stands for all that embeddings depend on but the text."""
        return f"hashed n-grams 1, width {self.width}"

    @property
    def about(self) -> str:
        """One line for reports."""
        return (
            f"encoder: hashed word and character n-grams, width {self.width}; no weights, so texts "
            "are near where they are written alike"
        )

    def encode(self, texts: Sequence[str], *, prompt: str | None = None) -> np.ndarray:
        """Embeddings, float32 [texts, width]; a text without a word gets zeros.

        Raises:
            Refused: a prompt is asked for; there are none.
        """
        if prompt is not None:
            raise Refused(f"prompt is {prompt!r}; hashed n-grams have none")
        from sklearn.feature_extraction.text import HashingVectorizer

        forms = [
            HashingVectorizer(n_features=self.width, norm=None, **options)
            for options in (
                {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
                {"analyzer": "char_wb", "ngram_range": (3, 5)},
            )
        ]
        out = np.empty((len(texts), self.width), np.float32)
        for begin in range(0, len(texts), _BATCH):
            batch = texts[begin : begin + _BATCH]
            total = 0.0
            for form in forms:
                counts = form.transform(batch)
                counts.data = np.sign(counts.data) * np.log1p(np.abs(counts.data))
                total = total + counts
            dense = total.toarray()
            norm = np.linalg.norm(dense, axis=1, keepdims=True)
            out[begin : begin + len(batch)] = dense / np.where(norm > 0, norm, 1.0)
        return out
