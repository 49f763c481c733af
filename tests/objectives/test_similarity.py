"""Losses on embeddings: sentence-transformers' values, masks, devices, and refusals."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.objectives.similarity import (
    cosine_loss,
    listwise_kl_loss,
    margin_mse_loss,
    multiple_negatives_loss,
)

B, N, D = 6, 4, 8


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((B, D), (B, N, D), (B, N)))


def parts(drawn):
    """Each loss as a function of embeddings and a mask, and how many terms a query has."""
    teacher = drawn[2]
    return {
        "multiple negatives": (multiple_negatives_loss, 1),
        "multiple negatives, dot, symmetric": (
            lambda q, d, m=None: multiple_negatives_loss(
                q, d, m, scale=0.7, similarity="dot", symmetric=True
            ),
            1,
        ),
        "cosine": (lambda q, d, m=None: cosine_loss(q, d[:, 0], teacher[: len(q), 0], m), 1),
        "margin mse": (
            lambda q, d, m=None: margin_mse_loss(q, d, teacher[: len(q), 1:], m),
            N - 1,
        ),
        "listwise kl": (lambda q, d, m=None: listwise_kl_loss(q, d, teacher[: len(q)], m), 1),
    }


NAMES = list(parts((None, None, np.zeros((B, N)))))


def peers(name, teacher):
    """The same loss of sentence-transformers, of embeddings."""
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    torch = pytest.importorskip("torch")

    def of(loss, labels=None):
        labels = None if labels is None else torch.tensor(labels)
        return lambda columns: loss.compute_loss_from_embeddings(columns, labels)

    mnr = losses.MultipleNegativesRankingLoss
    return {
        "multiple negatives": lambda: of(mnr(None)),
        "multiple negatives, dot, symmetric": lambda: of(
            mnr(
                None,
                scale=0.7,
                similarity_fct=util.dot_score,
                directions=("query_to_doc", "doc_to_query"),
                partition_mode="per_direction",
            )
        ),
        "cosine": lambda: (
            lambda columns: of(losses.CosineSimilarityLoss(None), teacher[:, 0])(columns[:2])
        ),
        "margin mse": lambda: of(losses.MarginMSELoss(None), teacher[:, 1:]),
        "listwise kl": lambda: of(losses.DistillKLDivLoss(None), teacher),
    }[name]()


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_sentence_transformers(name, drawn):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    pytest.importorskip("sentence_transformers", reason="parity extra is not installed")
    queries, documents, teacher = drawn
    loss = parts(drawn)[name][0]

    def mean(q, d):
        total, denominator, _ = loss(q, d)
        return total / denominator

    found, gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(queries, documents)
    q = torch.tensor(queries, requires_grad=True)
    d = torch.tensor(documents, requires_grad=True)
    expected = peers(name, teacher)([q, *d.unbind(1)])
    expected.backward()
    assert abs(float(found) - expected.item()) < 1e-5
    for gradient, tensor in zip(gradients, (q, d), strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-5)


@pytest.mark.parity
def test_temperatures_are_those_of_sentence_transformers(drawn):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer").losses
    queries, documents, teacher = drawn
    total, denominator, _ = listwise_kl_loss(
        queries, documents, teacher, temperature=2.0, teacher_temperature=0.5
    )
    peer = losses.DistillKLDivLoss(None, student_temperature=2.0, teacher_temperature=0.5)
    columns = [torch.tensor(queries), *torch.tensor(documents).unbind(1)]
    expected = peer.compute_loss_from_embeddings(columns, torch.tensor(teacher)).item()
    assert abs(float(total / denominator) - expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_what_the_mask_leaves_out_is_never_read(name, drawn):
    queries, documents, _ = drawn
    loss, terms = parts(drawn)[name]
    loss = jax.jit(loss)
    mask = np.arange(B) < 4
    broken = np.where(mask[:, None], queries, np.nan)
    broken_documents = np.where(mask[:, None, None], documents, np.inf)
    expected = loss(queries[:4], documents[:4])
    found = loss(broken, broken_documents, mask)
    assert float(found[1]) == float(expected[1]) == 4 * terms
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda q, d: loss(q, d, mask)[0], argnums=(0, 1)))(
        broken, broken_documents
    )
    for g in gradient:
        assert np.isfinite(g).all() and (g[4:] == 0).all() and (np.abs(g[:4]).max() > 0)


def test_a_missing_hard_negative_is_no_candidate(drawn):
    queries, documents, _ = drawn
    there = np.ones((B, N), int)
    there[2, 3] = 0
    hidden = documents.copy()
    hidden[2, 3] = np.nan
    found = multiple_negatives_loss(queries, hidden, document_mask=there)[0]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    scores = 20 * unit(queries) @ unit(documents).reshape(B * N, D).T
    kept = np.delete(scores, 2 * N + 3, axis=1)
    own = scores[np.arange(B), np.arange(B) * N]
    expected = (np.log(np.exp(kept).sum(1)) - own).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_metrics_of_a_solved_batch():
    queries = np.eye(B, D, dtype=np.float32)
    documents = queries[:, None]
    total, n, metrics = multiple_negatives_loss(queries, documents)
    assert float(metrics.sums["accuracy"]) == float(n) == B
    assert float(total) < 1e-6
    teacher = np.tile([3.0, 1.0], (B, 1)).astype(np.float32)
    two = np.stack([3 * queries, queries], axis=1)
    total, _, metrics = listwise_kl_loss(queries, two, teacher)
    assert abs(float(total)) < 1e-5 and float(metrics.sums["top1"]) == B
    total, n, metrics = margin_mse_loss(queries, two, np.full((B, 1), 2.0))
    assert abs(float(total)) < 1e-5 and float(metrics.sums["agreement"]) == float(n) == B


PROGRAM = """
import jax, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from jaxconv.objectives.similarity import multiple_negatives_loss

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
q, d = (rng.normal(size=s).astype(np.float32) for s in ((8, 5), (8, 3, 5)))
mask = np.array([1, 1, 0, 1, 1, 1, 1, 0])

for symmetric in (False, True):
    whole = partial(multiple_negatives_loss, symmetric=symmetric)
    part = partial(whole, axis_name="data")

    def on_each(q, d, mask):
        (total, n), g = jax.value_and_grad(
            lambda q, d: part(q, d, mask)[:2], argnums=(0, 1), has_aux=True
        )(q, d)
        return jax.lax.psum(total, "data"), jax.lax.psum(n, "data"), g

    rows = P("data")
    found = jax.jit(jax.shard_map(
        on_each, mesh=mesh, in_specs=rows, out_specs=(P(), P(), rows), check_vma=False
    ))(q, d, mask)
    total, n, _ = whole(q, d, mask)
    gradient = jax.grad(lambda q, d: whole(q, d, mask)[0], argnums=(0, 1))(q, d)
    for one, other in zip(jax.tree.leaves(found), [total, n, *gradient], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
print("same")
"""


def test_negatives_across_devices_are_those_of_one_batch():
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q, d, t: multiple_negatives_loss(q, d, scale=0.0), "scale is 0.0"),
        (lambda q, d, t: multiple_negatives_loss(q, d[:, :, :3]), "documents has shape"),
        (lambda q, d, t: multiple_negatives_loss(q, d, document_mask=t[:2]), "document_mask has"),
        (lambda q, d, t: multiple_negatives_loss(q, d, similarity="l2"), "similarity is 'l2'"),
        (lambda q, d, t: cosine_loss(q, q, t), "targets has shape"),
        (lambda q, d, t: margin_mse_loss(q, d, t), "margins has shape"),
        (lambda q, d, t: listwise_kl_loss(q, d, t, temperature=0), "temperature is 0"),
        (lambda q, d, t: listwise_kl_loss(q, d[:, :1], t[:, :1]), "each query needs two"),
        (lambda q, d, t: listwise_kl_loss(q, d, t, jnp.ones(2)), "mask has shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, said, drawn):
    with pytest.raises(ValueError, match=said):
        call(*drawn)
