"""Texts of any length in batches of few shapes, so that next to nothing is padding.

A row holds one text or several; `segment_ids` keep them from seeing each other. Attention costs a
row its width squared, so short texts go into narrow rows: texts are taken shortest first, and what
does not fill a whole batch of one width moves on to fill the gaps of the next. Where attention can
go from text to text (`models/text_attention.py`), longer texts go into one long row instead, end to
end.
"""

import bisect
import dataclasses
from collections.abc import Generator, Iterator, Sequence

import jax
import numpy as np

from jaxconv.data.packing import Packing, first_fit
from jaxconv.errors import Refused

WIDTHS = (64, 128, 256, 512)
BATCH_TOKENS = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextRows:
    """Packed texts; a pytree. R rows of W tokens, N = R W; room for P texts.

    Attributes:
        tokens: int32 [R, W]; 0 where there is none.
        positions: int32 [R, W], counted from 0 in each text.
        segment_ids: int32 [R, W], 1, 2, … along a row; 0 is padding.
        owner: int32 [R, W], index of the text that the token is of; P for padding.
        first: int32 [P], flat index in [N] of each text's first token; 0 where there is no text.
        length: int32 [P], tokens; 0 where there is no text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    owner: np.ndarray
    first: np.ndarray
    length: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batch:
    """Attributes:
    records: int64, index of each text among all; in the order of `rows.first`.
    rows: at least as many texts; those past `records` are none.
    is_stream: whether it is one row of texts end to end, the longest first.
    """

    records: np.ndarray
    rows: TextRows
    is_stream: bool


def batches(
    texts: Sequence[Sequence[int]],
    *,
    longest: int,
    batch_tokens: int = BATCH_TOKENS,
    streams: bool = False,
) -> Iterator[Batch]:
    """All texts, each once, in batches of about `batch_tokens` tokens and few shapes.

    Args:
        texts: token ids of each, at least one.
        longest: tokens that the longest text may have.
        batch_tokens: rows times width of a batch, as near as it goes.
        streams: whether texts of more than `WIDTHS[0]` tokens go into long rows, end to end.

    Raises:
        Refused: a text has no token or more than `longest`.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    for i in np.flatnonzero((lengths < 1) | (lengths > longest))[:1]:
        raise Refused(f"text {i} has {lengths[i]} tokens; it may have 1 to {longest}")
    order = np.argsort(lengths, kind="stable")
    if streams:
        order = yield from _streams(texts, lengths, order, max(batch_tokens, longest))
    widths = row_widths(longest)
    waiting = np.zeros(0, np.int64)
    begin = 0
    for width in widths:
        end = np.searchsorted(lengths[order], width, side="right")
        waiting = np.concatenate([waiting, order[begin:end]])
        begin = end
        if not len(waiting):
            continue
        is_last = end == len(order)
        rows = max(batch_tokens // width, 1)
        packing = first_fit(lengths[waiting], width)
        full = packing.rows // rows
        for i in range(full):
            yield _batch(texts, waiting, packing, i * rows, rows)
        if is_last:
            if left := packing.rows - full * rows:
                yield _batch(texts, waiting, packing, full * rows, _power_of_two(left))
            return
        waiting = waiting[packing.row >= full * rows]


def _streams(texts, lengths, order, most: int) -> Generator[Batch, None, np.ndarray]:
    """Streams of the longer texts, each filled with the longest that still fit; returns the texts
    that are left, in their order."""
    left = order.tolist()
    sizes = lengths[order].tolist()
    while left and sizes[-1] > WIDTHS[0]:
        taken, room = [], most
        while at := bisect.bisect_right(sizes, room):
            taken.append(left.pop(at - 1))
            room -= sizes.pop(at - 1)
        length = lengths[taken]
        start = np.cumsum(length) - length
        width = min(_power_of_two(most - room), most)
        packing = Packing(np.zeros_like(length), start, length, 1, width)
        yield _batch(texts, np.array(taken), packing, 0, 1, is_stream=True)
    return np.array(left, np.int64)


def row_widths(longest: int) -> tuple[int, ...]:
    """The widths of rows for texts of up to `longest` tokens."""
    widths = [width for width in WIDTHS if width < longest]
    while not widths or widths[-1] < longest:
        widths.append(next((w for w in WIDTHS if w >= longest), 2 * (widths or [256])[-1]))
    return tuple(min(width, longest) for width in widths)


def _batch(
    texts, waiting, packing: Packing, start: int, rows: int, *, is_stream: bool = False
) -> Batch:
    """Some rows of a packing as a batch."""
    inside = np.flatnonzero((packing.row >= start) & (packing.row < start + rows))
    inside = inside[np.lexsort((packing.start[inside], packing.row[inside]))]
    row = packing.row[inside] - start
    part = Packing(row, packing.start[inside], packing.length[inside], rows, packing.width)
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    within = np.arange(len(row)) - np.repeat(begins, np.diff(begins, append=len(row)))
    room = max(_power_of_two(len(row)), rows)
    records = waiting[inside]

    def per_text(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, room - len(row))).astype(np.int32)

    def repeat(values: np.ndarray, fill: int = 0) -> np.ndarray:
        return part.scatter([np.repeat(values, part.length)], np.int32, fill)

    return Batch(
        records,
        TextRows(
            tokens=part.scatter([texts[i] for i in records], np.int32),
            positions=part.scatter([np.arange(n) for n in part.length], np.int32),
            segment_ids=repeat(within + 1),
            owner=repeat(np.arange(len(row)), room),
            first=per_text(row * part.width + part.start),
            length=per_text(part.length),
        ),
        is_stream,
    )


def _power_of_two(n: int) -> int:
    """The least that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()
