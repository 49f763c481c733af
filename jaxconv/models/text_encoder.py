"""What every user of embeddings asks of an encoder, and where to get one."""

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxconv.models.hashed_ngrams import HashedNgrams
from jaxconv.models.sentence_folder import load_sentence_encoder


class TextEncoder(Protocol):
    """Texts to vectors: a `SentenceEncoder` or `HashedNgrams`."""

    @property
    def width(self) -> int:
        """Numbers of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Stands for all that embeddings depend on but the text."""

    @property
    def about(self) -> str:
        """One line for reports, which says whether there are weights."""

    def encode(self, texts: Sequence[str], *, prompt: str | None = None) -> np.ndarray:
        """float32 [texts, width]."""


def load_text_encoder(path: str | os.PathLike[str] = "", *, dim: int | None = None) -> TextEncoder:
    """The sentence encoder of a folder or hub id; hashed n-grams where the path is "".

    Args:
        path: see `load_sentence_encoder`.
        dim: numbers of an embedding: the Matryoshka cut, or the width of hashed n-grams; None
            keeps all.
    """
    if not str(path):
        return HashedNgrams() if dim is None else HashedNgrams(dim)
    return load_sentence_encoder(path, dim=dim)
