"""Which of many labels a text may have, by their words: a prompt need not show them all."""

import functools
from collections.abc import Mapping

import numpy as np


class Shortlist:
    """Ranks labels by the similarity of a text to their names and descriptions (TF-IDF of words and
    of parts of words).

    Args:
        descriptions: by label, what it means; may be "".
    """

    def __init__(self, descriptions: Mapping[str, str]):
        self.descriptions = dict(descriptions)

    @property
    def names(self) -> list[str]:
        return list(self.descriptions)

    def scores(self, text: str) -> np.ndarray:
        """float64 [labels]: how similar a text is to each, 0 to 1."""
        vectorizer, labels_LV = self._fitted
        return (labels_LV @ vectorizer.transform([text]).T).toarray()[:, 0] / 2

    def top(self, text: str, k: int) -> list[str]:
        """The `k` likeliest labels, in the order in which they were given."""
        order = np.argsort(-self.scores(text), kind="stable")[:k]
        return [self.names[i] for i in sorted(order)]

    @functools.cached_property
    def _fitted(self):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union

        union = make_union(
            TfidfVectorizer(sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True),
        )
        words = [f"{name.replace('_', ' ')} {text}" for name, text in self.descriptions.items()]
        return union, union.fit_transform(words)
