"""How often the body of a while loop runs, read off its condition."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxconv.perf.hlo_text import Computation, Instruction, Module

# What hands a scalar on unchanged.
_SAME = ("bitcast", "broadcast", "convert", "copy", "copy-done", "copy-start", "reshape")


@dataclass(frozen=True)
class Trips:
    """Of one loop.

    Attributes:
        count: iterations.
        exact: False where a condition may end the loop earlier, so that `count` is the most.
    """

    count: int
    exact: bool


@dataclass(frozen=True)
class _Carried:
    """Element `index` of the loop's state, plus `offset`."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class _Compared:
    direction: str
    left: Any
    right: Any


@dataclass(frozen=True)
class _Both:
    parts: tuple[Any, ...]


class _State:
    """The tuple that a loop carries, while its body or condition is read."""


def trip_count(module: Module, around: Computation, loop: Instruction) -> Trips | None:
    """Iterations of a `while` instruction of the computation `around`; None where it is not known.

    XLA's own `known_trip_count` is taken where the text has it. Otherwise the condition must
    compare a counter, which starts at a constant and grows by a constant, with a constant. Of
    conditions joined by "and", the one that ends the loop first counts.
    """
    known = _known_trip_count(loop.attributes)
    if known is not None:
        return Trips(known, exact=True)
    initial = _evaluate(module, around, loop.operands[0], ())
    body = module.computations[loop.called("body")]
    updated = _evaluate(module, body, body.root.name, (_State(),))
    condition = module.computations[loop.called("condition")]
    test = _evaluate(module, condition, condition.root.name, (_State(),))
    if not isinstance(initial, tuple) or not isinstance(updated, tuple):
        return None
    tests = test.parts if isinstance(test, _Both) else (test,)
    counts = [_count(t, initial, updated) for t in tests]
    if not any(n is not None for n in counts):
        return None
    return Trips(min(n for n in counts if n is not None), exact=len(counts) == 1)


def _known_trip_count(attributes: str) -> int | None:
    _, found, rest = attributes.partition('"known_trip_count":{"n":"')
    return int(rest.partition('"')[0]) if found else None


def _count(test: Any, initial: tuple, updated: tuple) -> int | None:
    if not isinstance(test, _Compared):
        return None

    def constant(value: Any) -> int | None:
        """A bound: a number, or an element of the state that the body does not change."""
        if isinstance(value, _Carried) and updated[value.index] == _Carried(value.index):
            start = initial[value.index]
            return start + value.offset if isinstance(start, int) else None
        return value if isinstance(value, int) else None

    left, right, direction = test.left, test.right, test.direction
    if constant(left) is not None:
        swapped = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
        left, right, direction = right, left, swapped.get(direction, direction)
    bound = constant(right)
    if bound is None or not isinstance(left, _Carried):
        return None
    start, after = initial[left.index], updated[left.index]
    if not isinstance(start, int) or not isinstance(after, _Carried) or after.index != left.index:
        return None
    step, away = after.offset, bound - (start + left.offset)
    if direction in ("GT", "GE"):
        step, away = -step, -away
    if step <= 0 or direction == "EQ":
        return None
    return max(0, away // step + 1 if direction in ("LE", "GE") else -(-away // step))


def _evaluate(module: Module, computation: Computation, name: str, given: tuple) -> Any:
    """A scalar or a tuple of them as far as it is known; None where it is not."""
    known: dict[str, Any] = {}
    wanted = _needed(computation, name)
    for instruction in computation:
        if instruction.name in wanted:
            known[instruction.name] = _value(module, instruction, known, given)
    return known.get(name)


def _needed(computation: Computation, name: str) -> set[str]:
    found, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in found or current not in computation.instructions:
            continue
        found.add(current)
        todo += computation.instructions[current].operands
    return found


def _value(module: Module, i: Instruction, known: Mapping[str, Any], given: tuple) -> Any:
    operands = [known.get(name) for name in i.operands]
    first = operands[0] if operands else None
    if i.opcode == "constant":
        is_scalar = i.shape.dims == () and i.literal.lstrip("-").isdigit()
        return int(i.literal) if is_scalar else None
    if i.opcode == "parameter":
        index = int(i.literal)
        return given[index] if index < len(given) else None
    if i.opcode == "tuple":
        return tuple(operands)
    if i.opcode == "get-tuple-element":
        index = int(i.attributes.partition("index=")[2].partition(",")[0])
        if isinstance(first, _State):
            return _Carried(index)
        return first[index] if isinstance(first, tuple) else None
    if i.opcode in _SAME:
        return first
    if i.opcode in ("add", "subtract"):
        return _sum(*operands, sign=1 if i.opcode == "add" else -1)
    if i.opcode == "compare":
        direction = i.attributes.partition("direction=")[2][:2]
        return _Compared(direction, *operands)
    if i.opcode == "and":
        parts = (p.parts if isinstance(p, _Both) else (p,) for p in operands)
        return _Both(sum(parts, ()))
    if i.opcode in ("fusion", "call"):
        inner = module.computations[i.called("calls") or i.called("to_apply")]
        return _evaluate(module, inner, inner.root.name, tuple(operands))
    return None


def _sum(left: Any, right: Any, sign: int) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.index, left.offset + sign * right)
    if isinstance(left, int) and isinstance(right, _Carried) and sign > 0:
        return _Carried(right.index, right.offset + left)
    return None
