"""Queries with their documents, as arrays that a retriever learns from."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxconv.data.batches import Share, Update
from jaxconv.data.plan import Placement, plan_counted
from jaxconv.data.text_rows import row_widths
from jaxconv.errors import Refused

_NARROW = (16, 32)  # widths of rows that hold one text each, besides those of `row_widths`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryBatch:
    """Padded texts; a pytree. Axes in front, if any, then B queries of N documents each.

    Attributes:
        queries: int32 [B, T].
        query_lengths: int32 [B].
        documents: int32 [B, N, S]; the first of each query belongs to it.
        document_lengths: int32 [B, N].
        teacher: float32 [B, N], scores of the documents by a teacher; zeros where there is none.
    """

    queries: np.ndarray
    query_lengths: np.ndarray
    documents: np.ndarray
    document_lengths: np.ndarray
    teacher: np.ndarray


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids of texts, end to end.

    Attributes:
        ids: int32 [tokens].
        begins: int64 [texts], where each begins.
        lengths: int32 [texts].
        widths: of padded rows, the longest text's at the end.
    """

    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    widths: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "Texts":
        lengths = np.array([len(text) for text in texts], np.int32)
        ids = np.fromiter((t for text in texts for t in text), np.int32, int(lengths.sum()))
        longest = max(int(lengths.max()), 1)
        widths = [width for width in _NARROW if width < longest]
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        return cls(ids, begins, lengths, np.array([*widths, *row_widths(longest)]))

    def padded(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [n, width], lengths) of some, in the least width that holds them all."""
        lengths = self.lengths[texts]
        width = self.widths[np.searchsorted(self.widths, lengths.max())]
        inside = np.arange(width) < lengths[:, None]
        out = np.zeros(inside.shape, np.int32)
        out[inside] = self.ids[(self.begins[texts][:, None] + np.arange(width))[inside]]
        return out, lengths


@dataclasses.dataclass(frozen=True)
class QueryDocuments:
    """All examples, of any lengths; what is padding is made with a batch.

    Attributes:
        queries: B texts.
        documents: B N texts, those of a query one after the other.
        teacher: float32 [B, N], as in `QueryBatch`.
    """

    queries: Texts
    documents: Texts
    teacher: np.ndarray

    @classmethod
    def of(
        cls,
        queries: Sequence[Sequence[int]],
        documents: Sequence[Sequence[Sequence[int]]],
        teacher: np.ndarray | None = None,
    ) -> "QueryDocuments":
        """Takes token ids, as `SentenceEncoder.tokens` gives them.

        Raises:
            Refused: no query, numbers of documents that differ, or a teacher that does not fit.
        """
        counts = sorted({len(own) for own in documents})
        if not len(queries) or len(documents) != len(queries) or len(counts) != 1 or not counts[0]:
            raise Refused(
                f"{len(queries)} queries with {len(documents)} lists of "
                f"{' or '.join(map(str, counts)) or 'no'} documents; there must be one list for "
                "each query, all as long"
            )
        shape = (len(queries), counts[0])
        teacher = np.zeros(shape, np.float32) if teacher is None else np.asarray(teacher, "f4")
        if teacher.shape != shape:
            raise Refused(f"teacher has shape {teacher.shape}; the documents ask for {shape}")
        flat = [document for own in documents for document in own]
        return cls(Texts.of(queries), Texts.of(flat), teacher)

    def __len__(self) -> int:
        return len(self.teacher)

    @property
    def tokens(self) -> int:
        """Of all queries and documents."""
        return len(self.queries.ids) + len(self.documents.ids)

    def take(self, records: np.ndarray) -> QueryBatch:
        """Some of the queries with their documents, in rows of one of a few widths."""
        teacher = self.teacher[records]
        count = teacher.shape[1]
        queries, query_lengths = self.queries.padded(records)
        texts = (np.asarray(records)[:, None] * count + np.arange(count)).reshape(-1)
        documents, lengths = self.documents.padded(texts)
        return QueryBatch(
            queries,
            query_lengths,
            documents.reshape(*teacher.shape, -1),
            lengths.reshape(teacher.shape),
            teacher,
        )


def plan_queries(count: int, *, batch: int, seed: int, steps: int) -> list[Placement]:
    """Updates of `batch` queries each, every query once an epoch, in an order of its own."""
    ones = np.ones(count, np.int64)
    return plan_counted(ones, examples=batch, rows_multiple=batch, width=1, seed=seed, steps=steps)


class QueryAssembler:
    """Makes one micro-batch of a placement; safe in several threads.

    Args:
        examples: all of them.
        share: this process's part of the queries of a micro-batch.
    """

    def __init__(self, examples: QueryDocuments, share: Share):
        self._examples, self._share = examples, share

    def __call__(self, placement: Placement) -> Update:
        every = self._examples.take(placement.records)  # so all processes have the same widths
        batch = jax.tree.map(lambda x: x[None, self._share.own], every)
        lengths = np.concatenate([every.query_lengths, every.document_lengths.reshape(-1)])
        cells = every.queries.size + every.documents.size
        return Update(batch, 1, lengths.astype(np.int64), cells)
