"""Batches of planned updates, made ahead of the training step by Grain's threads."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from jaxconv.data.plan import Placement
from jaxconv.errors import Refused

Batch = TypeVar("Batch")

_THREADS = 2
_AHEAD = 4  # batches that wait for the training step


class Loader(Generic[Batch]):
    """The batches of a run, one an update, from any position of its sequence on.

    Its state is `position`: that of the first example which no update has taken yet. Nothing in it
    depends on how many processes share the rows, so a run may go on with another number of them.

    Args:
        placements: of all updates.
        assemble: makes a batch of a placement; called in several threads.
    """

    def __init__(self, placements: Sequence[Placement], assemble: Callable[[Placement], Batch]):
        self._placements = list(placements)
        self._assemble = assemble
        self._update = 0
        self._batches: Any = None

    @property
    def position(self) -> int:
        """Position of the first example of the next update."""
        if self._update < len(self._placements):
            return self._placements[self._update].first
        last = self._placements[-1]
        return last.first + len(last.records)

    def seek(self, position: int) -> None:
        """Goes to the update that begins at `position`.

        Raises:
            Refused: none does: the data or the sizes are not those of the checkpoint.
        """
        ends = {placement.first: i for i, placement in enumerate(self._placements)}
        self.close()
        self._update = len(self._placements)
        if position != self.position:
            if position not in ends:
                raise Refused(
                    f"the checkpoint stands before example {position} of the sequence, where no "
                    "update begins; the data must be those that it was made with"
                )
            self._update = ends[position]

    def __next__(self) -> Batch:
        if self._update == len(self._placements):
            raise StopIteration
        if self._batches is None:
            import grain

            self._batches = iter(
                grain.MapDataset.source(self._placements[self._update :])
                .map(self._assemble)
                .to_iter_dataset(
                    grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
                )
            )
        batch = next(self._batches)
        self._update += 1
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __enter__(self) -> "Loader[Batch]":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
