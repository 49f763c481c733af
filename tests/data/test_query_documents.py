"""Queries with documents: every token in its place, and little padding around it."""

import numpy as np

from jaxconv.data.batches import Share
from jaxconv.data.query_documents import QueryAssembler, QueryDocuments, plan_queries


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 99, n).tolist() for n in lengths]


def test_one_long_document_does_not_widen_the_others():
    queries = texts_of([6] * 500)
    documents = texts_of([14] * 999 + [400])
    examples = QueryDocuments.of(queries, [documents[2 * i : 2 * i + 2] for i in range(500)])
    assemble = QueryAssembler(examples, Share(20))
    updates = [assemble(p) for p in plan_queries(500, batch=20, seed=0, steps=25)]
    assert sum(update.tokens for update in updates) == 500 * 6 + 999 * 14 + 400
    widths = sorted(update.batch.documents.shape[-1] for update in updates)
    assert widths == [16] * 24 + [400]
    assert {update.batch.queries.shape[-1] for update in updates} == {6}
    assert sum(update.cells for update in updates) == 500 * 6 + 40 * (24 * 16 + 400)


def test_a_batch_has_every_token_of_its_texts_and_zeros():
    rng = np.random.default_rng(1)
    queries = texts_of(rng.integers(1, 40, 30), 2)
    flat = texts_of(rng.integers(1, 300, 90), 3)
    documents = [flat[3 * i : 3 * i + 3] for i in range(30)]
    teacher = rng.normal(size=(30, 3)).astype(np.float32)
    examples = QueryDocuments.of(queries, documents, teacher)
    assert examples.tokens == sum(map(len, [*queries, *flat]))
    for records in ([4, 0, 29], [7], list(range(30))):
        batch = examples.take(np.array(records))
        np.testing.assert_array_equal(batch.teacher, teacher[records])
        assert batch.queries.shape[1] in (16, 32, max(map(len, queries)))
        assert batch.queries.dtype == batch.documents.dtype == np.int32
        for row, i in enumerate(records):
            pairs = [(batch.queries[row], batch.query_lengths[row], queries[i])]
            for at in range(3):
                length = batch.document_lengths[row, at]
                pairs.append((batch.documents[row, at], length, documents[i][at]))
            for ids, length, text in pairs:
                assert ids[:length].tolist() == text and not ids[length:].any()


def test_processes_share_one_width():
    documents = [[text] for text in texts_of([3, 3, 3, 50])]
    examples = QueryDocuments.of(texts_of([2, 20, 2, 2]), documents)
    placement = plan_queries(4, batch=4, seed=0, steps=1)[0]
    parts = [QueryAssembler(examples, Share(4, n, 2))(placement) for n in range(2)]
    assert {part.batch.documents.shape for part in parts} == {(1, 2, 1, 50)}
    assert {part.batch.queries.shape for part in parts} == {(1, 2, 20)}
    whole = examples.take(placement.records)
    together = np.concatenate([part.batch.documents[0] for part in parts])
    np.testing.assert_array_equal(together, whole.documents)
