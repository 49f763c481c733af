"""Optimized HLO text as XLA prints it, read into computations, instructions and shapes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")


@dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
        dtype: as HLO names it, such as "bf16".
        dims: sizes.
        minor_to_major: order of the dimensions in memory, empty where the text has no layout.
        tile: sizes by which the minor-most dimensions are padded, empty where nothing is.
        space: memory space; 0 is the device's main memory (HBM), others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the values alone."""
        return _bytes(self.size, self.dtype)

    @property
    def padded_bytes(self) -> int:
        """With the padding of the layout's tiles: what the array takes in memory."""
        sizes = list(self.dims)
        order = self.minor_to_major or tuple(reversed(range(len(sizes))))
        for dim, tile in zip(order, reversed(self.tile), strict=False):
            sizes[dim] = -(-sizes[dim] // tile) * tile
        return _bytes(math.prod(sizes), self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _bytes(size: int, dtype: str) -> int:
    # f32, s8, u4, c64, f8e4m3fn: the first number is the width.
    bits = _ITEM_BITS[dtype] if dtype in _ITEM_BITS else int(re.search(r"\d+", dtype)[0])
    return -(-size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        opcode: such as "fusion".
        shapes: of the result, the leaves of a tuple in order.
        parts: how many of `shapes` each element of a tuple result has; empty for an array.
        operands: names of instructions of the same computation.
        literal: what stands between the brackets, for the value of a constant.
        attributes: the rest of the line.
        is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    parts: tuple[int, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def op_name(self) -> str:
        """The JAX scopes and primitive that it comes from, empty where XLA made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """Name of the computation that an attribute such as `calls` names."""
        found = re.search(rf"\b{key}=%?([^\s,{{}}]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        pair = (self.called("true_computation"), self.called("false_computation"))
        return tuple(name for name in pair if name)

    def numbers(self, key: str) -> tuple[int, ...]:
        """Of an attribute such as `dimensions={0,1}`; empty where it is absent."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclass
class Computation:
    """Instructions in the order of the text; every operand comes before its users."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return next(i for i in self if i.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Arrays that an instruction reads, tuples taken apart."""
        known = self.instructions
        return [s for name in instruction.operands if name in known for s in known[name].shapes]


@dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
        computations: by name.
        entry: the one that runs.
        devices: how many run it together.
    """

    computations: dict[str, Computation]
    entry: Computation
    devices: int


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text()` gives.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _statements(text):
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = current if header[1] else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            instruction = _instruction(start[2], bool(start[1]), line[start.end() :])
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is not HLO of a compiled program")
    first = text[: text.find("\n")]
    counts = [re.search(rf"{key}=(\d+)", first) for key in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _statements(text: str) -> Iterator[str]:
    """Lines, with those that an attribute with line breaks has split put together again."""
    pending = ""
    for line in text.splitlines():
        starts = _INSTRUCTION.match(line) or _HEADER.match(line) or line.rstrip() == "}"
        if starts or not line.strip():
            if pending:
                yield _COMMENT.sub("", pending)
            pending = line if starts else ""
        else:
            pending = pending + " " + line if pending else line
    if pending:
        yield _COMMENT.sub("", pending)


def _instruction(name: str, is_root: bool, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    if kind.startswith("("):
        elements = [_shapes(part) for part in _split(kind[1:-1])]
        shapes, parts = sum(elements, ()), tuple(len(e) for e in elements)
    else:
        shapes, parts = _shapes(kind), ()
    operands = [part.split()[-1].lstrip("%") for part in _split(literal) if part]
    opcode = rest[:opening]
    if opcode in ("constant", "parameter"):
        operands = []
    attributes = rest[closing + 1 :].lstrip(", ")
    return Instruction(
        name, opcode, shapes, parts, tuple(operands), literal.strip(), attributes, is_root
    )


def _closing(text: str, opening: int) -> int:
    """Index of the bracket that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def _split(text: str) -> list[str]:
    """By the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*match.groups()) for match in _SHAPE.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    order, _, rest = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype,
        sizes,
        tuple(int(n) for n in order.split(",") if n.isdigit()),
        tuple(int(n) for n in tile[1].split(",") if n) if tile else (),
        int(space[1]) if space else 0,
    )
