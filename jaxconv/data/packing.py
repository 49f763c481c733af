"""Streams of any length in rows of one width, so that a training step has one shape.

A row holds several streams one after the other. `segment_ids` keep them from seeing each other and
`positions` start anew in each, so a packed loss equals the unpacked one.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxconv.errors import Refused


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Packed rows, all [..., width]; a pytree.

    Attributes:
        tokens: int32 inputs.
        targets: int32, the token that follows each input in its stream.
        positions: int32, counted from 0 in each stream.
        segment_ids: int32, 1, 2, … along a row; 0 is padding.
        mask: bool, the targets that the loss counts.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each stream lies: `row` and `start` [streams], of `length` tokens."""

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    rows: int
    width: int

    @property
    def _cells(self) -> np.ndarray:
        """Flat index in [rows × width] of every token of every stream, streams in order."""
        begin = self.row * self.width + self.start
        within = np.arange(self.length.sum()) - np.repeat(
            np.cumsum(self.length) - self.length, self.length
        )
        return np.repeat(begin, self.length) + within

    def scatter(self, values: Sequence[np.ndarray | Sequence], dtype, fill=0) -> np.ndarray:
        """One array [rows, width] of one sequence a stream; `fill` where there is none."""
        out = np.full(self.rows * self.width, fill, dtype)
        if len(values):
            out[self._cells] = np.concatenate([np.asarray(v, dtype) for v in values])
        return out.reshape(self.rows, self.width)

    def used(self, rows: int) -> int:
        """How many micro-batches of so many rows hold anything."""
        return -(-(int(self.row.max()) + 1) // rows)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `scatter`: one array a stream."""
        flat = np.asarray(array).reshape(-1)[self._cells]
        return np.split(flat, np.cumsum(self.length)[:-1])


def first_fit(lengths: Sequence[int], width: int, *, rows_multiple: int = 1) -> Packing:
    """Puts the longest streams first, each into the first row that still has room.

    Args:
        lengths: tokens of each stream, at most `width`.
        width: tokens a row.
        rows_multiple: the number of rows is padded to a multiple of this.

    Raises:
        Refused: a stream is longer than a row.
    """
    length = np.asarray(lengths, np.int64)
    if length.size and length.max() > width:
        raise Refused(f"a stream has {length.max()} tokens; a packed row holds {width}")
    row, start = np.zeros_like(length), np.zeros_like(length)
    used = np.zeros(len(length), np.int64)
    opened = 0
    for i in np.argsort(-length, kind="stable"):
        fits = np.flatnonzero(used[:opened] + length[i] <= width)
        if fits.size:
            r = fits[0]
        else:
            r, opened = opened, opened + 1
        row[i], start[i] = r, used[r]
        used[r] += length[i]
    rows = max(-(-max(opened, 1) // rows_multiple) * rows_multiple, rows_multiple)
    return Packing(row, start, length, rows, width)


def pack_tokens(
    packing: Packing, tokens: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]
) -> TokenBatch:
    """Next-token prediction over packed streams.

    Args:
        tokens: ids of each stream.
        masks: for each token, whether it is to be learned. Input i predicts token i + 1, so the
            mask of the first token is not used.
    """
    segment = np.zeros(len(tokens), np.int64)
    for r in np.unique(packing.row):
        inside = np.flatnonzero(packing.row == r)
        segment[inside[np.argsort(packing.start[inside], kind="stable")]] = np.arange(
            1, len(inside) + 1
        )
    return TokenBatch(
        tokens=packing.scatter(tokens, np.int32),
        targets=packing.scatter([shift(t) for t in tokens], np.int32),
        positions=packing.scatter([np.arange(n) for n in packing.length], np.int32),
        segment_ids=packing.scatter(
            [np.full(n, s) for n, s in zip(packing.length, segment, strict=True)], np.int32
        ),
        mask=packing.scatter([shift(m) for m in masks], bool),
    )


def shift(values: Sequence, fill=0) -> np.ndarray:
    """Moves what belongs to token i + 1 to input i; the last input predicts nothing."""
    values = np.asarray(values)
    return np.append(values[1:], np.asarray(fill, values.dtype))


def microbatches(batch, rows: int):
    """Splits the rows of every array into [microbatches, rows, width]."""
    return jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)
