"""The encoder without weights."""

import numpy as np
import pytest

from jaxconv.errors import Refused
from jaxconv.models.hashed_ngrams import HashedNgrams
from jaxconv.models.text_encoder import load_text_encoder


def test_texts_that_are_written_alike_are_near():
    encoder = load_text_encoder()
    assert isinstance(encoder, HashedNgrams) and "no weights" in encoder.about
    texts = [
        "my card has not arrived yet",
        "when will my new card arrive?",
        "exchange rates for euros and dollars",
        "",
    ]
    found = encoder.encode(texts)
    assert found.shape == (4, 1024) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0], atol=1e-6)
    near = found @ found.T
    assert near[0, 1] > 0.3 > 0.15 > abs(near[0, 2])
    np.testing.assert_array_equal(encoder.encode(texts[::-1]), found[::-1])


def test_the_width_is_part_of_the_fingerprint():
    assert load_text_encoder(dim=64).encode(["a b"]).shape == (1, 64)
    assert HashedNgrams(64).fingerprint != HashedNgrams(65).fingerprint
    with pytest.raises(Refused, match="width is 0"):
        HashedNgrams(0)
    with pytest.raises(Refused, match="prompt is 'query'"):
        HashedNgrams().encode(["a"], prompt="query")
