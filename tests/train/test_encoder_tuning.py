"""A retriever learns which document belongs to a query, and goes on where it stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxconv.data.query_documents import QueryDocuments
from jaxconv.errors import Refused, Stopped
from jaxconv.models.encoder import Encoder
from jaxconv.models.encoder_config import EncoderConfig
from jaxconv.models.pooling import POOLINGS, pool_rows
from jaxconv.models.sentence_encoder import SentenceEncoder
from jaxconv.train import interrupt
from jaxconv.train.encoder_tuning import RetrieverSettings, fit_retriever
from jaxconv.train.workdir import Workdir

CONFIG = EncoderConfig(
    family="bert",
    vocab_size=90,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    mlp_dim=32,
    max_positions=16,
    init_std=0.1,
)
SETTINGS = RetrieverSettings(
    steps=40, batch=8, learning_rate=1e-2, warmup=4, checkpoint_every=10, evaluate_every=20
)


def examples(count, seed, teacher=False):
    """Queries in words 10 to 49; a document says the same in words 50 to 89."""
    rng = np.random.default_rng(seed)
    queries = [rng.integers(10, 50, rng.integers(2, 5)).tolist() for _ in range(count)]
    documents = [[[t + 40 for t in query], rng.integers(50, 90, 5).tolist()] for query in queries]
    scores = np.tile([4.0, 0.0], (count, 1)) if teacher else None
    return QueryDocuments.of(queries, documents, scores)


@pytest.fixture
def start():
    return SentenceEncoder(Encoder(CONFIG, jax.random.key(0)), None, max_length=16)


@pytest.mark.parametrize(
    "loss",
    [
        "multiple_negatives",
        pytest.param("margin_mse", marks=pytest.mark.slow),
        pytest.param("listwise_kl", marks=pytest.mark.slow),
    ],
)
def test_held_out_queries_find_their_documents(loss, start, tmp_path):
    scale = 20.0 if loss == "multiple_negatives" else 5.0
    settings = dataclasses.replace(SETTINGS, loss=loss, scale=scale)
    before = jax.tree.leaves(start.encoder)[0].copy()
    with Workdir(tmp_path) as workdir:
        trained, outcome = fit_retriever(
            start, examples(200, 0, True), examples(40, 1, True), settings, workdir
        )
        lines = workdir.metrics.read_text().splitlines()
    assert outcome.step == 40
    np.testing.assert_array_equal(jax.tree.leaves(start.encoder)[0], before)
    held_out = [row["held_out/loss"] for row in map(json.loads, lines) if "held_out/loss" in row]
    assert len(held_out) == 3 and held_out[-1] < 0.75 * held_out[0]
    assert trained.encoder.config == CONFIG


def test_a_stopped_run_ends_with_the_same_bits(start, tmp_path, monkeypatch):
    train, held_out = examples(50, 0), examples(8, 1)
    with Workdir(tmp_path / "whole") as workdir:
        whole, _ = fit_retriever(start, train, held_out, SETTINGS, workdir)
    calls = iter(range(1000))
    with Workdir(tmp_path / "parts") as workdir:
        monkeypatch.setattr(interrupt, "requested", lambda: next(calls) == 12)
        with pytest.raises(Stopped):
            fit_retriever(start, train, held_out, SETTINGS, workdir)
        monkeypatch.setattr(interrupt, "requested", lambda: False)
        parts, _ = fit_retriever(start, train, held_out, SETTINGS, workdir)
    for one, other in zip(
        jax.tree.leaves(whole.encoder), jax.tree.leaves(parts.encoder), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_does_not_reach_the_vector(pooling):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 6, 4)).astype(np.float32)
    lengths = np.array([6, 2, 1])
    broken = np.where(np.arange(6)[None, :, None] < lengths[:, None, None], hidden, np.nan)
    alone = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "lasttoken": lambda x: x[-1]}
    expected = [alone[pooling](x[:n]) for x, n in zip(hidden, lengths, strict=True)]
    np.testing.assert_allclose(pool_rows(broken, lengths, pooling), expected, rtol=1e-6)


def test_what_does_not_fit_is_refused(start, tmp_path):
    with pytest.raises(Refused, match="2 queries with 2 lists of 1 or 2 documents"):
        QueryDocuments.of([[1], [2]], [[[1]], [[1], [2]]])
    with pytest.raises(Refused, match=r"teacher has shape \(2, 2\); the documents ask for \(2, 1"):
        QueryDocuments.of([[1], [2]], [[[1]], [[1]]], np.zeros((2, 2)))
    with pytest.raises(Refused, match="loss is 'mse'; it may be multiple_negatives"):
        RetrieverSettings(loss="mse")
    with (
        Workdir(tmp_path) as workdir,
        pytest.raises(Refused, match="train has 4 queries; it must have at least 8"),
    ):
        fit_retriever(start, examples(4, 0), examples(4, 0), SETTINGS, workdir)
