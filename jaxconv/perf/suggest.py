"""The fastest of a run's layouts that fits, by compiling them: strategy, remat, micro-batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxconv.errors import Refused
from jaxconv.models.config import EXECUTION
from jaxconv.perf.chips import Topology
from jaxconv.perf.memory import size
from jaxconv.perf.planned import Planned, compile_all
from jaxconv.perf.table import Program, fits

_TENSOR = (2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """How a train step may lie on its devices.

    Attributes:
        strategy, tensor: of `config.mesh`.
        remat: of `config.model`.
        rows: of a micro-batch on one device, or on `tensor` of them.
    """

    strategy: str
    tensor: int
    remat: str
    rows: int

    def rows_in_all(self, devices: int) -> int:
        """Rows of a micro-batch on all devices, of one copy of the model or many."""
        return self.rows * devices // self.tensor

    def __str__(self) -> str:
        tensor = f" tensor={self.tensor}" if self.tensor > 1 else ""
        return f"{self.strategy}{tensor} remat={self.remat} rows={self.rows}"


@dataclass(frozen=True)
class Tried:
    """One layout and what came of it: `rate` in tokens a second of all devices, None where it does
    not fit or is refused, and `why` in a few words."""

    layout: Layout
    rate: float | None
    why: str


def search(plan: Callable[[Layout], Planned], topology: Topology, rows: int) -> Iterator[Tried]:
    """Tries layouts, one after another, and yields what came of each.

    Of every strategy it begins with most remat and one row a device, takes more rows while that
    fits and is faster, and then less remat: what does not fit rules out all that takes more. The
    rows of an update are those of the config, so that only micro-batches are tried which divide it.

    Args:
        plan: the train step of a layout; it may refuse one.
        topology: to compile for.
        rows: of an update.
    """
    strategies = [("ddp", 1), ("fsdp", 1), *(("fsdp_tp", n) for n in _TENSOR)]
    for strategy, tensor in strategies:
        if topology.devices % tensor:
            continue
        for remat in reversed(EXECUTION["remat"]):
            here, fastest = 1, 0.0
            while rows % Layout(strategy, tensor, remat, here).rows_in_all(topology.devices) == 0:
                tried = _try(plan, topology, Layout(strategy, tensor, remat, here))
                yield tried
                if tried.rate is None or tried.rate <= fastest:
                    break
                here, fastest = 2 * here, tried.rate
            if not fastest:
                break


def _try(plan: Callable[[Layout], Planned], topology: Topology, layout: Layout) -> Tried:
    try:
        planned = plan(layout)
    except Refused as error:
        return Tried(layout, None, f"refused: {error}")
    available = topology.chip.usable_bytes
    held = planned.arguments + sum(planned.beside.values())
    if held > available:
        return Tried(layout, None, f"does not fit: {size(held)} before it begins")
    (program,) = compile_all([planned], topology)
    return Tried(layout, *_verdict(program, topology))


def _verdict(program: Program, topology: Topology) -> tuple[float | None, str]:
    if not fits(program, topology):
        return None, f"does not fit: {size(program.peak)}"
    time = program.estimate
    return time.tokens_per_second, f"{size(program.peak)}, limited by {time.limit}"
