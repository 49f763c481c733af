"""Encoders: packed rows, initial weights, and what a configuration refuses."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.data.text_rows import batches
from jaxconv.errors import Refused
from jaxconv.models.encoder import Encoder, attention
from jaxconv.models.encoder_config import EncoderConfig, encoder_from_hf, encoder_to_hf
from jaxconv.models.pooling import cut, pool
from jaxconv.models.text_attention import text_attention
from jaxconv.models.weights import named_weights

BERT = EncoderConfig(
    family="bert",
    vocab_size=50,
    embed_dim=24,
    num_layers=2,
    num_heads=3,
    mlp_dim=40,
    max_positions=200,
    init_std=0.3,
)
ROBERTA = replace(BERT, family="roberta", token_types=1, pad_token_id=4)
MPNET = replace(BERT, family="mpnet", token_types=0, relative_buckets=32, pad_token_id=1)


forward = jax.jit(lambda encoder, *rows: encoder(*rows))


@pytest.mark.parametrize("config", [BERT, ROBERTA, MPNET], ids=lambda c: c.family)
def test_texts_packed_into_rows_have_the_vectors_that_each_has_alone(config):
    encoder = Encoder(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 50, n) for n in (3, 20, 70, 9, 64, 1, 130, 31)]
    tokens = np.array([np.pad(text, (0, 130 - len(text))) for text in texts])
    padded = np.asarray(forward(encoder, tokens, None, (tokens > 0).astype(int)))
    hidden = [x[: len(text)] for x, text in zip(padded, texts, strict=True)]
    alone = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "lasttoken": lambda x: x[-1]}
    seen = []
    for batch in batches([list(t) for t in texts], longest=190, batch_tokens=256):
        rows = batch.rows
        found = forward(encoder, rows.tokens, rows.positions, rows.segment_ids)
        for pooling, reduce in alone.items():
            vectors = np.asarray(pool(found, rows, pooling))[: len(batch.records)]
            expected = [reduce(hidden[i]) for i in batch.records]
            np.testing.assert_allclose(vectors, expected, atol=2e-5)
        seen += list(batch.records)
    assert sorted(seen) == list(range(8))


def test_the_cut_keeps_the_first_numbers_and_unit_length():
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    short = np.asarray(cut(x, 4, normalize=True))
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(short * np.linalg.norm(x[:, :4], axis=1)[:, None], x[:, :4], 1e-5)
    np.testing.assert_array_equal(cut(x, None, normalize=False), x)
    np.testing.assert_array_equal(cut(np.zeros((1, 3)), None, normalize=True), 0)


def test_bfloat16_computes_in_bfloat16_and_comes_near():
    x = np.random.default_rng(0).integers(5, 50, (2, 30))
    exact = forward(Encoder(BERT, jax.random.key(0)), x)
    coarse = forward(Encoder(replace(BERT, dtype="bfloat16"), jax.random.key(0)), x)
    assert coarse.dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(coarse, np.float32) - exact).max() < 0.2


def test_gradients_reach_every_weight():
    encoder = Encoder(MPNET, jax.random.key(0))
    x = np.random.default_rng(0).integers(5, 50, (2, 30))
    grads = jax.jit(jax.grad(lambda e: jnp.sum(e(x)[:, 0] ** 2 * jnp.arange(24))))(encoder)
    for name, grad in named_weights(grads):
        if name != "layers.bk":  # adds the same to all scores of a query
            assert np.abs(grad[...]).max() > 1e-6, name


@pytest.mark.parametrize("is_biased", [False, True])
def test_attention_from_text_to_text_is_that_of_rows(is_biased):
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 50, n).tolist() for n in (300, 10, 64, 65, 129, 1, 257, 96)]
    seen = []
    q, k, v = rng.normal(size=(3, 2, 512, 4, 8)).astype(np.float32)
    bias = rng.normal(size=(4, 512, 512)).astype(np.float32) if is_biased else None
    if is_biased:  # of distances, as MPNet's
        bias = bias[:, 0, np.abs(np.arange(512)[:, None] - np.arange(512))]
    one, many = jax.jit(partial(text_attention, longest=512)), jax.jit(attention)
    for batch in batches(texts, longest=512, batch_tokens=512, streams=True):
        if batch.is_stream:
            rows = batch.rows
            n = rows.tokens.size
            parts = [x[:1, :n] for x in (q, k, v)]
            cut = None if bias is None else bias[:, :n, :n]
            found = one(*(x[0] for x in parts), rows.first, rows.length, bias)
            expected = many(*parts, rows.segment_ids, cut)[0]
            real = rows.segment_ids[0] > 0
            np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
            assert (np.asarray(found)[~real] == 0).all()
            seen += batch.records.tolist()
    assert {0, 3, 4, 6, 7} <= set(seen)


@pytest.mark.parametrize("config", [BERT, ROBERTA, MPNET], ids=lambda c: c.family)
def test_a_config_survives_its_file(config):
    assert encoder_from_hf(encoder_to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; encoders: bert"),
        ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_attention_heads": 5}, "num_heads is 5; it must divide embed_dim, 24"),
        ({"hidden_size": 0}, "embed_dim is 0"),
        ({"type_vocab_size": 0}, "token_types is 0; family bert needs at least 1"),
        ({"model_type": "mpnet", "relative_attention_num_buckets": 8}, "relative_buckets is 8"),
        ({"model_type": "roberta", "max_position_embeddings": 1}, "needs more than 1"),
    ],
)
def test_what_is_not_computed_is_refused(change, said):
    with pytest.raises(Refused, match=said):
        encoder_from_hf(encoder_to_hf(BERT) | change)
