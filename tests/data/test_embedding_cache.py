"""The cache of embeddings: what is computed, what is found, and what a kill leaves."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxconv.data.embedding_cache import EmbeddingCache
from jaxconv.errors import Refused


class Counting:
    """Embeds a text as its length and a number of its own, and remembers what it was asked."""

    width = 2

    def __init__(self, fingerprint="a", number=0.5):
        self.fingerprint, self.number, self.asked = fingerprint, number, []

    def encode(self, texts, *, prompt=None):
        self.asked += texts
        return np.array([[len(text), self.number] for text in texts], np.float32)


def test_each_different_text_is_encoded_once(tmp_path):
    encoder = Counting()
    texts = ["a", "bb", "a", "", "ü\ud800"]
    with EmbeddingCache(tmp_path / "sub" / "cache.sqlite") as cache:
        first = cache.encode(encoder, texts)
        assert encoder.asked == ["a", "bb", "", "ü\ud800"]
        np.testing.assert_array_equal(first[:, 0], [1, 2, 1, 0, 2])
    with EmbeddingCache(tmp_path / "sub" / "cache.sqlite") as cache:
        np.testing.assert_array_equal(cache.encode(encoder, [*texts, "ccc"]), [*first, [3, 0.5]])
        assert encoder.asked[4:] == ["ccc"]
        assert (cache.hits, cache.misses, len(cache)) == (5, 1, 5)


def test_another_encoder_or_prompt_is_another_embedding(tmp_path):
    with EmbeddingCache(tmp_path / "cache") as cache:
        one, other = Counting("a", 1.0), Counting("b", 2.0)
        assert cache.encode(one, ["x"])[0, 1] == 1.0
        assert cache.encode(other, ["x"])[0, 1] == 2.0
        cache.encode(one, ["x"], prompt="query")
        assert one.asked == ["x", "x"]
        assert len(cache) == 3


def test_no_text_is_no_row(tmp_path):
    with EmbeddingCache(tmp_path / "cache") as cache:
        assert cache.encode(Counting(), []).shape == (0, 2)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a diary" * 1000)
    with pytest.raises(Refused, match="is no cache of embeddings"):
        EmbeddingCache(tmp_path / "cache")


PROGRAM = """
import os, signal, sys
import numpy as np
from jaxconv.data import embedding_cache
embedding_cache._BATCH = 10

class Encoder:
    width, fingerprint = 2, "a"
    def encode(self, texts, *, prompt=None):
        if int(texts[0]) >= 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([[float(t), 1.0] for t in texts], np.float32)

embedding_cache.EmbeddingCache(sys.argv[1]).encode(Encoder(), [str(i) for i in range(100)])
"""


def test_a_kill_loses_no_finished_batch(tmp_path):
    path = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    encoder = Counting("a")
    with EmbeddingCache(path) as cache:
        assert len(cache) == 50
        found = cache.encode(encoder, [str(i) for i in range(100)])
    assert encoder.asked == [str(i) for i in range(50, 100)]
    np.testing.assert_array_equal(found[:50, 0], np.arange(50))
