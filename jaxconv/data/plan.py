"""Which examples an update takes, and where each of them lies in its packed rows.

Training goes through the examples in an endless sequence: a new order every epoch, each example
once in each. An update takes the next ones, as many as fit into its rows. So all that has to be
remembered between updates is a position in that sequence, whatever the number of processes that
share the rows, and every process can plan alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxconv.data.packing import Packing, first_fit
from jaxconv.errors import Refused

_WIDTHS = 64  # rows without packing come in multiples of this


@dataclasses.dataclass(frozen=True)
class Placement:
    """One update's share of the sequence.

    Attributes:
        first: position of its first example.
        records: int64 [n], indices of its examples, in the order of the sequence.
        packing: where each of them lies.
    """

    first: int
    records: np.ndarray
    packing: Packing


def plan(
    lengths: Sequence[int],
    *,
    rows: int,
    width: int,
    seed: int,
    steps: int | None = None,
    epochs: int | None = None,
    pack: bool = True,
) -> list[Placement]:
    """The placements of all updates of a run.

    Args:
        lengths: tokens of each example, at most `width`.
        rows: of an update.
        width: tokens a row.
        seed: of the order.
        steps: updates; or
        epochs: passes over all examples; the last update may be short.
        pack: False gives each example a row of its own. Rows of such an update are only as wide as
            its longest example needs, in steps of 64 tokens: a shape is compiled for each.

    Raises:
        Refused: no example, or one that is longer than a row.
    """
    lengths = _checked(lengths, width)
    end = None if epochs is None else epochs * len(lengths)
    return _fill(lengths, _Order(len(lengths), seed), rows, width, steps, end, pack)


def plan_counted(
    lengths: Sequence[int],
    *,
    examples: int,
    rows_multiple: int,
    width: int,
    seed: int,
    steps: int,
) -> list[Placement]:
    """Placements of updates that take so many `examples` each, in as many rows as they need, a
    multiple of `rows_multiple`."""
    lengths = _checked(lengths, width)
    order = _Order(len(lengths), seed)
    placements = []
    for at in range(0, steps * examples, examples):
        records = np.array([order[at + i] for i in range(examples)], np.int64)
        packing = first_fit(lengths[records], width, rows_multiple=rows_multiple)
        placements.append(Placement(at, records, packing))
    return placements


def plan_once(lengths: Sequence[int], *, rows: int, width: int) -> list[Placement]:
    """Placements that go through all examples once, in order: for scoring."""
    lengths = _checked(lengths, width)
    return _fill(lengths, range(len(lengths)), rows, width, None, len(lengths), True)


def _fill(lengths, order, rows, width, steps, end, pack) -> list[Placement]:
    """Placements of as many examples as fit, each where the one before has ended."""
    placements: list[Placement] = []
    at = 0
    while (steps is None or len(placements) < steps) and (end is None or at < end):
        bins = _Bins(rows, width, pack)
        taken: list[int] = []
        while end is None or at + len(taken) < end:
            record = order[at + len(taken)]
            if not bins.take(int(lengths[record])):
                break
            taken.append(record)
        placements.append(Placement(at, np.array(taken, np.int64), bins.packing()))
        at += len(taken)
    return placements


def _checked(lengths: Sequence[int], width: int) -> np.ndarray:
    lengths = np.asarray(lengths, np.int64)
    if not lengths.size:
        raise Refused("there are 0 examples; there must be at least 1")
    if lengths.max() > width:
        raise Refused(f"an example has {lengths.max()} tokens; a row holds {width}")
    return lengths


class _Order:
    """Positions of the sequence to indices: a permutation for each epoch."""

    def __init__(self, n: int, seed: int):
        self._n, self._seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, i = divmod(position, self._n)
        if epoch not in self._epochs:
            self._epochs.pop(epoch - 2, None)
            self._epochs[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._n)
        return int(self._epochs[epoch][i])


class _Bins:
    """Rows that fill up: each example goes into the first row with room.

    When there is none, everything is put anew, longest first, which often makes some.
    """

    def __init__(self, rows: int, width: int, pack: bool):
        self._rows, self._width, self._pack = rows, width, pack
        self.lengths: list[int] = []
        self._row: list[int] = []
        self._used: list[int] = []

    def take(self, length: int) -> bool:
        """Places one more example, or says that it does not fit."""
        if not self._pack:
            if len(self.lengths) == self._rows:
                return False
            self._row.append(len(self.lengths))
            self.lengths.append(length)
            return True
        if self._put(length, self._row, self._used):
            self.lengths.append(length)
            return True
        lengths = [*self.lengths, length]
        row, used = [0] * len(lengths), []
        if sum(lengths) > self._rows * self._width:
            return False
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            placed: list[int] = []
            if not self._put(lengths[i], placed, used):
                return False
            row[i] = placed[0]
        self.lengths, self._row, self._used = lengths, row, used
        return True

    def _put(self, length: int, row: list[int], used: list[int]) -> bool:
        for r, taken in enumerate(used):
            if taken + length <= self._width:
                row.append(r)
                used[r] += length
                return True
        if len(used) == self._rows:
            return False
        row.append(len(used))
        used.append(length)
        return True

    def packing(self) -> Packing:
        start, used = [], [0] * self._rows
        for r, length in zip(self._row, self.lengths, strict=True):
            start.append(used[r])
            used[r] += length
        width = self._width
        if not self._pack:
            width = min(-(-max(self.lengths) // _WIDTHS) * _WIDTHS, width)
        return Packing(
            np.array(self._row, np.int64),
            np.array(start, np.int64),
            np.array(self.lengths, np.int64),
            self._rows,
            width,
        )
