"""What a compiled program takes of a device's main memory, and what to do if it is too much."""

import re
from dataclasses import asdict, dataclass

import jax

from jaxconv.models.config import EXECUTION
from jaxconv.perf.hlo_text import Module

_KINDS = {"parameter": "argument", "maybe-live-out": "output", "preallocated-temp": "temporary"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory on one device while a program runs.

    Attributes:
        arguments: what goes in.
        outputs: what comes out.
        aliased: of the outputs, what stands where a donated argument stood.
        temporaries: what lives only inside the program.
        code: the program itself, where the device keeps it in main memory.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def resident(self) -> int:
        """What is there before and after the program, too."""
        return self.arguments + self.outputs - self.aliased

    @property
    def peak(self) -> int:
        return self.resident + self.temporaries + self.code

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


def memory_of(compiled: "jax.stages.Compiled", assignment: str = "") -> Memory:
    """The compiler's own plan.

    XLA's sum of temporaries includes those in on-chip memory (128 MiB of a TPU v5e, say). The text
    of its buffer assignment tells them apart; without it the sum stands.
    """
    stats = compiled.memory_analysis()
    planned = planned_memory(assignment).temporaries if assignment else stats.temp_size_in_bytes
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        planned,
        stats.generated_code_size_in_bytes,
    )


def planned_memory(assignment: str) -> Memory:
    """The same from XLA's text of the buffer assignment alone, which has no size of the code."""
    arguments = outputs = aliased = temporaries = 0
    for line in assignment.splitlines():
        header = _ALLOCATION.match(line)
        if header is None:
            continue
        size, kinds = int(header[1]), _kinds(header[2])
        arguments += size * ("argument" in kinds)
        outputs += size * ("output" in kinds)
        aliased += size * (kinds == ["argument", "output"])
        temporaries += size * ("temporary" in kinds)
    return Memory(arguments, outputs, aliased, temporaries, code=0)


@dataclass(frozen=True)
class Shortage:
    """Why a compiler gave up: bytes that the program needs and that the device has."""

    needed: int
    available: int


def shortage_of(error: Exception) -> Shortage | None:
    """Reads the compiler's error; None if it is not about main memory."""
    found = re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
        r"|Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        str(error),
    )
    if found is None:
        return None
    needed, unit, available, available_unit = (part for part in found.groups() if part is not None)
    return Shortage(
        round(float(needed) * _UNITS[unit]), round(float(available) * _UNITS[available_unit])
    )


@dataclass(frozen=True)
class Buffer:
    """One array in the compiler's plan.

    Attributes:
        name: of the HLO instruction.
        shape: such as "bf16[4,4096,2048]".
        kind: "temporary" or "output".
        bytes: size on one device, padding included.
        scope: JAX scopes and primitive of what writes it; empty where XLA made it up.
    """

    name: str
    shape: str
    kind: str
    bytes: int
    scope: str


def largest_buffers(assignment: str, module: Module, count: int = 6) -> list[Buffer]:
    """The largest arrays in main memory besides the arguments, largest first.

    They need not all live at once. Values that share a place in memory are one buffer.

    Args:
        assignment: XLA's text of the buffer assignment.
        module: the program.
        count: how many.
    """
    scopes = {i.name: i.op_name for c in module.computations.values() for i in c}
    buffers: dict[tuple[int, int, int], Buffer] = {}
    allocation, kinds = -1, []
    for line in assignment.splitlines():
        if header := _ALLOCATION.match(line):
            allocation, kinds = allocation + 1, _kinds(header[2])
        elif kinds in (["output"], ["temporary"]) and (value := _VALUE.match(line)):
            name, size, offset, shape = value.groups()
            place = (allocation, int(offset), int(size))
            buffer = Buffer(name, shape, kinds[0], int(size), scopes.get(name, ""))
            if place not in buffers or (buffer.scope and not buffers[place].scope):
                buffers[place] = buffer
        elif not line.startswith(" "):
            kinds = []
    return sorted(buffers.values(), key=lambda b: -b.bytes)[:count]


_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*):$")
_VALUE = re.compile(
    r" value: <\d+ ([^\s{]+)(?:\{[\d,]*\})?(?: \(phi\))? @\d+> "
    r"\(size=(\d+),offset=(\d+)\): ([a-z]\w*\[[\d,]*\])"
)


def _kinds(attributes: str) -> list[str]:
    """Of an allocation; none for constants, on-chip memory and the like."""
    if re.search(r"color [1-9]", attributes):
        return []
    return [kind for text, kind in _KINDS.items() if text in attributes]


def suggestion(resident: int, available: int, *, remat: str, microbatch: int) -> str:
    """One thing to change so that a program fits that does not.

    Args:
        resident: bytes of a device that the program's arguments and results take.
        available: bytes that a device has.
        remat: `DecoderConfig.remat` of the program.
        microbatch: rows of a micro-batch on one device.
    """
    levels = EXECUTION["remat"]
    if resident >= available:
        return (
            f"use a larger mesh, or split the weights over more of it: weights, optimizer state "
            f"and batch alone take {size(resident)} of a device, which has {size(available)}"
        )
    if remat != levels[-1]:
        more = levels[levels.index(remat) + 1]
        return f"use more remat: remat={more!r} instead of {remat!r}"
    if microbatch > 1:
        return f"use a smaller microbatch: {microbatch // 2} rows a device instead of {microbatch}"
    return "use a larger mesh: remat is full and a device has one row of a micro-batch"


def size(n: float) -> str:
    """Bytes in the largest binary unit of which there is one."""
    for unit, step in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= step:
            return f"{n / step:.1f} {unit}"
    return f"{n:.0f} bytes"
