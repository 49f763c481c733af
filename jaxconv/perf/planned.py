"""Programs of a run before there are any weights: how they are traced, and what they are for."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from jaxconv.perf.chips import Topology
from jaxconv.perf.compiling import Compilation, compile_program
from jaxconv.perf.roofline import estimate, places
from jaxconv.perf.table import Program


@dataclass(frozen=True)
class Planned:
    """One program of a run, its arguments shapes alone.

    Attributes:
        name: such as "train step".
        lower: traces the program.
        mesh: the devices that it runs on.
        tokens: that one run learns or makes, on all devices of the run together, where others may
            run the same program at the same time.
        model_flops: of one run on the devices of `mesh`, by the formulas of `perf.flops`.
        relief: (bytes of a device that stay, bytes that it has) to one thing to change where the
            program does not fit.
        trips: iterations of loops whose number is an argument; see `perf.hlo.program_cost`.
        kernels: FLOPs of one call of a kernel that does not tell; see there.
        beside: bytes of a device that the run holds while the program runs and that the program
            does not see, by what they are.
        arguments: bytes of a device that go in.
    """

    name: str
    lower: Callable[[], "jax.stages.Lowered"]
    mesh: Mesh
    tokens: float
    model_flops: float
    relief: Callable[[int, int], str]
    trips: Mapping[str, float] = field(default_factory=dict)
    kernels: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, int] = field(default_factory=dict)
    arguments: int = 0


def compile_all(planned: Sequence[Planned], topology: Topology) -> list[Program]:
    """Compiles programs for a topology, and estimates what one run of each takes.

    Those that are `lower`ed by the same function differ in what is beside them, and are compiled
    once.
    """
    done: dict[int, Compilation] = {}
    programs = []
    for plan in planned:
        if id(plan.lower) not in done:
            done[id(plan.lower)] = compile_program(
                plan.lower(), trips=plan.trips, kernels=plan.kernels
            )
        compilation = done[id(plan.lower)]
        time = estimate(
            compilation.cost,
            topology,
            places(plan.mesh),
            tokens=plan.tokens,
            model_flops=plan.model_flops,
        )
        programs.append(Program(plan.name, compilation, time, plan.mesh, plan.beside))
    return programs


def bytes_on_a_device(tree: Any) -> int:
    """Of shapes with shardings, without the padding that a compiler may add."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
