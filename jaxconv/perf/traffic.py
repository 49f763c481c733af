"""Bytes that an HLO instruction moves between the chip and its main memory."""

from jaxconv.perf.hlo_text import Computation, Instruction, Module, Shape

# They hand on what is there, or mark the end of what their start has moved.
_FREE = (
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
)
_READ_IN_PART = ("dynamic-slice", "gather", "slice")
_UPDATED_IN_PLACE = ("dynamic-update-slice", "scatter")
_SEEN_THROUGH = ("bitcast",)


def memory_traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes read and written, with the padding of the layouts.

    Arrays in on-chip memory are not counted. Of an array that is only sliced the slices count, and
    of one that is updated in place, the update.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode.endswith("-start"):
        return _started(instruction, operands)
    if opcode in _READ_IN_PART:
        read = instruction.shape.padded_bytes if operands[0].shape.space == 0 else 0
        return float(read + _stored(instruction.shape) + _all(operands[1:]))
    if opcode in _UPDATED_IN_PLACE:
        written = 0 if instruction.shape.space else _update(computation, instruction)
        return float(written + _all(operands[1:]))
    if opcode == "fusion":
        return _fusion(module, computation, instruction)
    return float(_all(operands) + sum(_stored(s) for s in instruction.shapes))


def _started(instruction: Instruction, operands: list[Instruction]) -> float:
    """Of the start of an asynchronous copy, slice or collective."""
    if instruction.opcode == "copy-start":  # (target, source, context)
        return float(_stored(operands[0].shape) + _stored(instruction.shapes[0]))
    result = instruction.shapes
    if instruction.opcode != "all-reduce-start" and instruction.parts:  # (operands, result, ...)
        first = instruction.parts[0]
        result = result[first : first + instruction.parts[1]]
    written = sum(_stored(s) for s in result)
    if instruction.opcode.removesuffix("-start") in _READ_IN_PART:
        return float(sum(s.padded_bytes for s in result) + written)
    return float(_all(operands) + written)


def _fusion(module: Module, computation: Computation, instruction: Instruction) -> float:
    inner = module.computations[instruction.called("calls")]
    in_flight = set() if instruction.name.startswith("async-collective-start") else _carried(inner)
    total = 0.0
    for name, parameter in zip(instruction.operands, inner.parameters, strict=True):
        operand = computation.instructions[name]
        if all(shape.space for shape in operand.shapes) or str(operand.shape) in in_flight:
            continue
        total += _read(module, inner, parameter)
    results = _results(inner)
    for shape, result in zip(instruction.shapes, results, strict=False):
        if shape.space == 0 and str(shape) not in in_flight:
            total += _written(inner, result, shape)
    return total


def _carried(computation: Computation) -> set[str]:
    """Arrays of a collective that a TPU runs beside a fusion, which only hands them on."""
    pieces = [i for i in computation if "chain_id=" in i.attributes]
    return {str(s) for i in pieces for s in (i.shape, *computation.operand_shapes(i))}


def _read(module: Module, computation: Computation, value: Instruction) -> float:
    """Bytes of `value`, an operand of a fusion, that the fusion reads."""
    whole = float(_all([value]))
    read = 0.0
    for user in computation:
        if value.name not in user.operands:
            continue
        place = user.operands.index(value.name)
        if user.opcode in _READ_IN_PART and place == 0:
            read += user.shape.padded_bytes
        elif user.opcode in _UPDATED_IN_PLACE and place == 0:
            continue
        elif user.opcode in _SEEN_THROUGH and not user.is_root:
            read += _read(module, computation, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            read += _read(module, inner, inner.parameters[place])
        else:
            return whole
    return min(read, whole)


def _results(computation: Computation) -> list[Instruction]:
    root = computation.root
    if root.opcode == "tuple":
        return [computation.instructions[name] for name in root.operands]
    return [root] * len(root.shapes)


def _written(computation: Computation, result: Instruction, shape: Shape) -> float:
    while result.opcode in _SEEN_THROUGH:
        result = computation.instructions[result.operands[0]]
    if result.opcode == "parameter":  # handed on
        return 0.0
    if result.opcode in _UPDATED_IN_PLACE:
        return float(_update(computation, result))
    return float(shape.padded_bytes)


def _update(computation: Computation, instruction: Instruction) -> int:
    """Bytes that change; a scatter that adds reads them first."""
    is_scatter = instruction.opcode == "scatter"
    update = computation.instructions[instruction.operands[-1 if is_scatter else 1]].shape
    return update.padded_bytes * (2 if is_scatter else 1)


def _stored(shape: Shape) -> int:
    return 0 if shape.space else shape.padded_bytes


def _all(instructions: list[Instruction]) -> int:
    return sum(_stored(shape) for i in instructions for shape in i.shapes)
