"""Packed rows of one update, from a token store and a plan."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxconv.data.packing import Packing, TokenBatch, microbatches, pack_tokens
from jaxconv.data.plan import Placement
from jaxconv.data.token_store import TokenStore
from jaxconv.errors import Refused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamBatch:
    """Packed streams, [micro-batches, rows, …]; a pytree.

    Attributes:
        tokens: the streams. Of a preference pair both lie in one row as neighbours: chosen in an
            odd segment, rejected in the even one after it.
        dropout_seeds: uint32 [M, R], one a row.
        reference: float32 [M, R, S], each segment's summed log-prob under the reference model, S as
            many segments as a row of pairs may hold; None where nobody asks for it.
    """

    tokens: TokenBatch
    dropout_seeds: np.ndarray
    reference: np.ndarray | None


def batch_shapes(microbatches: int, rows: int, width: int, *, scored: bool) -> StreamBatch:
    """The shapes of a batch; `scored` is whether it has log-probs under a reference model."""

    def array(dtype, *dims):
        return jax.ShapeDtypeStruct((microbatches, rows, *dims), dtype)

    ids = array(np.int32, width)
    return StreamBatch(
        TokenBatch(ids, ids, ids, ids, array(bool, width)),
        array(np.uint32),
        array(np.float32, width // 2 * 2) if scored else None,
    )


@dataclasses.dataclass(frozen=True)
class Update:
    """A batch with what the host knows of it.

    Attributes:
        batch: of this process.
        count: micro-batches that hold anything.
        lengths: int64, tokens of each stream of the whole update, all processes together.
        cells: how many tokens there could be in as many micro-batches.
    """

    batch: Any
    count: int
    lengths: np.ndarray
    cells: int

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's part of the rows of every micro-batch.

    Attributes:
        rows: of a micro-batch.
        process: which one this is of
        processes: so many.
        held: int64, the rows that it holds, in order; those of a block where it is None.

    Raises:
        Refused: the rows cannot be shared out evenly.
    """

    rows: int
    process: int = 0
    processes: int = 1
    held: np.ndarray | None = None

    def __post_init__(self):
        if self.held is None and self.rows % self.processes:
            raise Refused(
                f"config.batch.rows={self.rows}; it must be a multiple of the number of processes, "
                f"{self.processes}"
            )

    @property
    def own(self) -> np.ndarray:
        """int64, the rows of a micro-batch that this process holds, in order."""
        if self.held is not None:
            return self.held
        block = self.rows // self.processes
        return np.arange(self.process * block, (self.process + 1) * block)

    def of(self, placement: Placement) -> tuple[np.ndarray, Packing]:
        """The examples in this process's rows, and where they lie in them."""
        packing = placement.packing
        batch, row = np.divmod(packing.row, self.rows)
        own = self.own
        kept = np.flatnonzero(np.isin(row, own))
        rows = packing.rows // self.rows * len(own)
        within = batch[kept] * len(own) + np.searchsorted(own, row[kept])
        return placement.records[kept], Packing(
            within, packing.start[kept], packing.length[kept], rows, packing.width
        )


class Assembler:
    """Makes batches of placements; safe in several threads.

    Args:
        store: the examples.
        share: this process's part.
        seed: of dropout.
        reference: float32 [n, streams], summed log-probs of every stream under a reference model.
    """

    def __init__(
        self,
        store: TokenStore,
        share: Share,
        *,
        seed: int,
        reference: np.ndarray | None = None,
    ):
        self._store, self._share, self._seed = store, share, seed
        self._reference = reference

    def __call__(self, placement: Placement) -> Update:
        records, packing = self._share.of(placement)
        streams = [stream for i in records for stream in self._store[i]]
        laid_out = spread(packing, self._store.stream_lengths[records])
        tokens = pack_tokens(laid_out, [s.tokens for s in streams], [s.mask for s in streams])
        reference = None
        if self._reference is not None:
            reference = np.zeros((packing.rows, packing.width // 2 * 2), np.float32)
            segment = tokens.segment_ids[laid_out.row, laid_out.start]
            reference[laid_out.row, segment - 1] = self._reference[records].reshape(-1)
        # A row's seed is that of its place in the update, so it does not depend on the processes.
        batches = placement.packing.rows // self._share.rows
        seeds = np.random.default_rng([self._seed, placement.first]).integers(
            1 << 32, size=(batches, self._share.rows), dtype=np.uint32
        )
        own = self._share.own
        batch = StreamBatch(tokens, seeds[:, own].reshape(-1), reference)
        lengths = self._store.stream_lengths[placement.records].reshape(-1)
        return as_update(microbatches(batch, len(own)), placement, self._share.rows, lengths)


def as_update(batch: Any, placement: Placement, rows: int, lengths: np.ndarray) -> Update:
    """What the host knows of a batch that was made of a placement in micro-batches of `rows`."""
    count = placement.packing.used(rows)
    return Update(batch, count, lengths, count * rows * placement.packing.width)


def spread(packing: Packing, stream_lengths: np.ndarray) -> Packing:
    """Where the streams [n, streams] of packed examples lie: one right after the other."""
    before = np.cumsum(stream_lengths, axis=1) - stream_lengths
    return Packing(
        np.repeat(packing.row, stream_lengths.shape[1]),
        (packing.start[:, None] + before).reshape(-1),
        stream_lengths.reshape(-1),
        packing.rows,
        packing.width,
    )
