"""What a compiled program does on each device: FLOPs, memory traffic, collectives.

`Compiled.cost_analysis()` counts the body of a loop once; here everything in a loop is multiplied
by the loop's trip count, loops within loops too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax

from jaxconv.perf.collectives import Collective, collective_of
from jaxconv.perf.hlo_text import Computation, Instruction, Module, parse
from jaxconv.perf.loops import trip_count
from jaxconv.perf.matmul_flops import matmul_flops
from jaxconv.perf.traffic import memory_traffic

# Custom calls that mark something for the compiler and compute nothing.
_MARKERS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "annotate_device_placement")
_KERNELS = ("tpu_custom_call", "mosaic_gpu", "triton", "__cudnn$fmha")


@dataclass(frozen=True)
class Work:
    """One instruction, or a fusion of several, as the device runs it.

    Attributes:
        name: in the HLO.
        scope: the JAX scopes that it comes from.
        flops: of one run, matrix products and kernels only.
        dtype: of what is multiplied; empty where nothing is.
        bytes: read from and written to main memory in one run.
        times: runs.
    """

    name: str
    scope: str
    flops: float
    dtype: str
    bytes: float
    times: float


@dataclass(frozen=True)
class Cost:
    """Of one run of a program on one device.

    Attributes:
        work: what computes or moves memory.
        collectives: what the devices send each other.
        assumptions: where a number is not in the program but a bound or the caller's.
    """

    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(w.flops * w.times for w in self.work)

    @property
    def bytes(self) -> float:
        """Main memory traffic."""
        return sum(w.bytes * w.times for w in self.work)

    def sent(self, kind: str | None = None) -> float:
        """Payload bytes of all collectives, or of one kind; see `Collective`."""
        return sum(c.bytes * c.times for c in self.collectives if kind in (None, c.kind))


def program_cost(
    program: "jax.stages.Compiled | str",
    *,
    trips: Mapping[str, float] | None = None,
    kernels: Mapping[str, float] | None = None,
) -> Cost:
    """Counts a compiled program or its optimized HLO text.

    Of a conditional the dearest branch counts.

    Args:
        trips: iterations of loops, by a text in the loop's scope ("" is in every scope). They are
            used where the program does not tell, and where it tells only the most.
        kernels: FLOPs of one call of a kernel, by a text in its scope. They are used where the
            kernel comes without an estimate of its own.
    """
    text = program if isinstance(program, str) else program.as_text()
    counter = _Counter(parse(text), trips or {}, kernels or {})
    counter.count(counter.module.entry, 1.0)
    return Cost(tuple(counter.work), tuple(counter.collectives), tuple(counter.assumptions))


@dataclass
class _Counter:
    module: Module
    trips: Mapping[str, float]
    kernels: Mapping[str, float]
    work: list[Work] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    # A dictionary for its order.
    assumptions: dict[str, None] = field(default_factory=dict)

    def count(self, computation: Computation, times: float, asynchronous: bool = False) -> None:
        chains: set[tuple[str, str]] = set()
        for instruction in computation:
            if instruction.opcode == "while":
                body = self.module.computations[instruction.called("body")]
                self.count(body, times * self._trips(computation, instruction))
            elif instruction.opcode == "conditional":
                self._count_dearest(instruction, times)
            elif instruction.opcode in ("call", "async-start"):
                name = instruction.called("to_apply") or instruction.called("calls")
                is_async = asynchronous or instruction.opcode == "async-start"
                self.count(self.module.computations[name], times, is_async)
            else:
                self._count_one(computation, instruction, times, asynchronous, chains)

    def _count_one(
        self,
        computation: Computation,
        instruction: Instruction,
        times: float,
        asynchronous: bool,
        chains: set[tuple[str, str]],
    ) -> None:
        found = collective_of(self.module, computation, instruction)
        for collective in found:
            # A TPU spreads one collective over the fusions that it runs beside: start, middle, end.
            if collective.chain and (collective.kind, collective.chain) in chains:
                continue
            chains.add((collective.kind, collective.chain))
            self.collectives.append(collective.at(times, asynchronous))
        flops, dtype = self._flops(computation, instruction)
        traffic = memory_traffic(self.module, computation, instruction)
        if instruction.opcode == "custom-call" and not flops:
            flops, traffic = self._kernel(instruction, traffic)
            dtype = "bf16" if flops else ""
        if flops or traffic:
            self.work.append(
                Work(instruction.name, instruction.op_name, flops, dtype, traffic, times)
            )

    def _flops(self, computation: Computation, instruction: Instruction) -> tuple[float, str]:
        """(FLOPs, widest dtype multiplied) of an instruction and all that is fused into it."""
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called("calls")]
            parts = [self._flops(inner, i) for i in inner]
            dtypes = [dtype for flops, dtype in parts if flops]
            return sum(flops for flops, _ in parts), max(dtypes, key=_width, default="")
        operands = computation.operand_shapes(instruction)
        flops = matmul_flops(instruction, operands)
        return (flops, max((s.dtype for s in operands[:2]), key=_width)) if flops else (0.0, "")

    def _kernel(self, instruction: Instruction, traffic: float) -> tuple[float, float]:
        """(FLOPs, bytes) of a custom call."""
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if target is None or target[1] in _MARKERS:
            return 0.0, 0.0
        estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
        if estimate:
            numbers = dict(re.findall(r'"(\w+)":"?(\d+)', estimate[1]))
            return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", traffic))
        scope = instruction.op_name or instruction.name
        for text, flops in self.kernels.items():
            if text in scope:
                self._assume(f"kernel {scope}: {flops:.3g} FLOPs a call, as given")
                return flops, traffic
        if any(kernel in target[1] for kernel in _KERNELS):
            self._assume(f"kernel {scope}: its FLOPs are not known and count as none")
        return 0.0, traffic

    def _trips(self, computation: Computation, loop: Instruction) -> float:
        scope = loop.op_name or loop.name
        known = trip_count(self.module, computation, loop)
        if known is not None and known.exact:
            return known.count
        for text, count in self.trips.items():
            if text in scope:
                self._assume(f"loop {scope}: {count:g} iterations, as given")
                return count
        if known is not None:
            self._assume(f"loop {scope}: {known.count} iterations, the most that it makes")
            return known.count
        self._assume(f"loop {scope}: iterations are not known and count as one")
        return 1.0

    def _count_dearest(self, instruction: Instruction, times: float) -> None:
        """The branch with the most FLOPs, then bytes."""
        costs = []
        for name in instruction.branches:
            branch = _Counter(self.module, self.trips, self.kernels)
            branch.count(self.module.computations[name], times)
            costs.append(branch)

        def price(branch: "_Counter") -> tuple[float, float]:
            cost = Cost(tuple(branch.work), (), ())
            return cost.flops, cost.bytes

        dearest = max(costs, key=price)
        self.work += dearest.work
        self.collectives += dearest.collectives
        self.assumptions |= dearest.assumptions

    def _assume(self, line: str) -> None:
        self.assumptions[line] = None


def _width(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0
