"""Collectives in HLO: what the devices of a group send each other."""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from jaxconv.perf.hlo_text import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        name, scope: in the HLO, and the JAX scopes that it comes from.
        bytes: payload of one run: what an all-gather gives each device, what each device puts into
            an all-reduce, a reduce-scatter, an all-to-all or a permute.
        group: positions in the program's device order of one of the groups (of a permute: of the
            first sender and its receiver).
        times: runs.
        asynchronous: whether it runs beside other work.
        chain: what the pieces share into which a TPU cuts one collective; empty for a whole one.
    """

    kind: str
    name: str
    scope: str
    bytes: float
    group: tuple[int, ...]
    times: float = 1.0
    asynchronous: bool = False
    chain: str = ""

    def at(self, times: float, asynchronous: bool) -> "Collective":
        return replace(self, times=times, asynchronous=asynchronous or self.asynchronous)


def collective_of(
    module: Module, computation: Computation, instruction: Instruction
) -> list[Collective]:
    """The collectives that an instruction is or has fused into it; mostly none."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        found = [c for i in inner for c in collective_of(module, inner, i)]
        if inner.root.opcode == "dynamic-slice":
            # A TPU's reduce-scatter: an all-reduce of which each device takes its slice.
            found = [replace(c, kind="reduce-scatter") if c.kind == KINDS[1] else c for c in found]
        return found
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return []
    group = _group(module, instruction)
    payload = sum(shape.bytes for shape in computation.operand_shapes(instruction))
    if kind == "all-gather":
        payload *= len(group)
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    started = instruction.opcode.endswith("-start")
    return [
        Collective(
            kind,
            instruction.name,
            instruction.op_name,
            float(payload),
            group,
            asynchronous=started or chain is not None,
            chain=chain[1] if chain else "",
        )
    ]


def axes_of(collective: Collective, mesh: Mesh) -> tuple[str, ...]:
    """The axes of the program's mesh along which the members of a group differ."""
    places = np.array(np.unravel_index(collective.group, mesh.devices.shape))
    differs = (places != places[:, :1]).any(axis=1)
    return tuple(name for name, yes in zip(mesh.axis_names, differs, strict=True) if yes)


def _group(module: Module, instruction: Instruction) -> tuple[int, ...]:
    attributes = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return tuple(int(n) for n in pairs.groups())
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        groups, dims, order = (
            tuple(int(n) for n in text.split(",")) if text else None for text in iota.groups()
        )
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices if order is None else devices.transpose(order)
        return tuple(int(n) for n in devices.reshape(groups)[0])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = set(re.findall(r"'(\w+)'", named[2]))
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in over else 0 for name in sizes)
        return tuple(int(n) for n in devices[first].reshape(-1))
    return tuple(range(module.devices))  # no groups: all of them
