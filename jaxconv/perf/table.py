"""What compiling a run's programs told, as one table for people and one dictionary for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

from jaxconv.perf.chips import Topology
from jaxconv.perf.collectives import Collective, axes_of
from jaxconv.perf.compiling import Compilation
from jaxconv.perf.memory import size
from jaxconv.perf.roofline import Estimate

_LARGEST = 5  # collectives that the table names


@dataclass(frozen=True)
class Program:
    """One compiled program of a run.

    Attributes:
        name: such as "train step".
        compilation: what the compiler told.
        estimate: of its time.
        mesh: that it runs on; None leaves the axes of collectives out.
        beside: bytes of a device that the run holds at the same time, by what they are.
    """

    name: str
    compilation: Compilation
    estimate: Estimate
    mesh: Mesh | None = None
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Bytes of a device that are there before and after the program runs, too."""
        return self.compilation.memory.resident + sum(self.beside.values())

    @property
    def peak(self) -> int:
        """Bytes of a device while the program runs."""
        return self.compilation.memory.peak + sum(self.beside.values())


def fits(program: Program, topology: Topology) -> bool:
    """Whether the program's memory, and what the run holds beside it, is within the device's."""
    shortage = program.compilation.shortage
    return shortage is None and program.peak <= topology.chip.usable_bytes


def to_dict(programs: Sequence[Program], topology: Topology) -> dict[str, Any]:
    """The `compile` section of `report.json`. Bytes, FLOPs and seconds are those of one device."""
    chip = topology.chip
    return {
        "topology": topology.name,
        "devices": topology.devices,
        "usable_bytes": chip.usable_bytes,
        "programs": {p.name: _program(p, topology) for p in programs},
    }


def _program(program: Program, topology: Topology) -> dict[str, Any]:
    done = program.compilation
    return {
        "fits": fits(program, topology),
        "memory": {
            **done.memory.to_dict(),
            "beside": dict(program.beside),
            "peak_of_run": program.peak,
        },
        "mesh": dict(program.mesh.shape) if program.mesh else None,
        "shortage": (
            {"needed": done.shortage.needed, "available": done.shortage.available}
            if done.shortage
            else None
        ),
        "flops": done.cost.flops,
        "bytes": done.cost.bytes,
        "collectives": [
            {
                "kind": c.kind,
                "bytes": c.bytes,
                "devices": len(c.group),
                "axes": list(_axes(program, c)),
                "times": c.times,
                "asynchronous": c.asynchronous,
                "scope": c.scope,
            }
            for c in _by_size(done.cost.collectives)
        ],
        "estimate": program.estimate.to_dict(),
        "assumptions": list(done.cost.assumptions),
        "buffers": [
            {"name": b.name, "shape": b.shape, "kind": b.kind, "bytes": b.bytes, "scope": b.scope}
            for b in done.buffers
        ],
        "compile_seconds": done.seconds,
    }


def render(programs: Sequence[Program], topology: Topology) -> str:
    """A column for each program; then its largest collectives, and what had to be assumed."""
    chip = topology.chip
    rows = [("one device", *(p.name for p in programs))]
    for label, value in (
        ("arguments", lambda p: _memory(p, "arguments")),
        ("outputs, new", _new_outputs),
        ("temporaries", lambda p: _memory(p, "temporaries")),
        ("program", lambda p: _memory(p, "code")),
        ("held beside", lambda p: size(sum(p.beside.values()))),
        (f"peak, of {size(chip.usable_bytes)}", lambda p: _peak(p, topology)),
        ("FLOPs", lambda p: f"{p.compilation.cost.flops:.3g}"),
        ("bytes of HBM traffic", lambda p: size(p.compilation.cost.bytes)),
        ("bytes of collectives", lambda p: size(p.compilation.cost.sent())),
        ("seconds, estimated", lambda p: f"{p.estimate.seconds:.3g}"),
        ("limited by", lambda p: p.estimate.limit),
        ("MFU", lambda p: "" if p.estimate.mfu is None else f"{p.estimate.mfu:.0%}"),
        ("tokens per second", lambda p: _rate(p.estimate.tokens_per_second)),
        ("seconds to compile", lambda p: f"{p.compilation.seconds:.1f}"),
    ):
        if label != "held beside" or any(p.beside for p in programs):
            rows.append((label, *(value(p) for p in programs)))
    lines = [f"{topology.name}: {topology.devices} devices", *_aligned(rows)]
    compilations = {id(p.compilation): p for p in reversed(programs)}
    for program in reversed(compilations.values()):
        cost = program.compilation.cost
        for c in _by_size(cost.collectives)[:_LARGEST]:
            how = ", asynchronous" if c.asynchronous else ""
            axes = "+".join(_axes(program, c))
            lines.append(
                f"{program.name}: {c.kind} of {size(c.bytes)} over {len(c.group)} devices"
                f"{f' of {axes}' if axes else ''}, {c.times:g} times{how}: {c.scope or c.name}"
            )
        lines += [f"{program.name}: {line}" for line in cost.assumptions]
    for program in programs:
        if fits(program, topology):
            continue
        if (lacks := program.compilation.shortage) is not None:
            lines.append(
                f"{program.name}: the compiler needs {size(lacks.needed)} and finds "
                f"{size(lacks.available)}"
            )
        lines += [
            f"{program.name}: held beside: {what} of {size(n)}"
            for what, n in program.beside.items()
        ]
        lines += [
            f"{program.name}: {b.kind} {b.shape} of {size(b.bytes)}: {b.scope or b.name}"
            for b in program.compilation.buffers
        ]
    return "\n".join(lines)


def _by_size(collectives):
    return sorted(collectives, key=lambda c: -c.bytes * c.times)


def _axes(program: Program, collective: Collective) -> tuple[str, ...]:
    return axes_of(collective, program.mesh) if program.mesh else ()


def _memory(program: Program, field: str) -> str:
    return size(getattr(program.compilation.memory, field))


def _new_outputs(program: Program) -> str:
    memory = program.compilation.memory
    return size(memory.outputs - memory.aliased)


def _peak(program: Program, topology: Topology) -> str:
    return size(program.peak) + ("" if fits(program, topology) else ": does not fit")


def _rate(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f"{tokens_per_second:,.0f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
