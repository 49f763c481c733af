"""Compiles a program and tells all that its compiler knows of it, also where it does not fit."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxconv.perf.hlo import Cost, program_cost
from jaxconv.perf.hlo_text import parse
from jaxconv.perf.memory import (
    Buffer,
    Memory,
    Shortage,
    largest_buffers,
    memory_of,
    planned_memory,
    shortage_of,
)


@dataclass(frozen=True)
class Compilation:
    """What came of compiling.

    Attributes:
        cost: what the program does.
        memory: what it takes, or would take.
        shortage: why the compiler gave up; None where it did not.
        buffers: the largest arrays.
        seconds: that compiling took.
    """

    cost: Cost
    memory: Memory
    shortage: Shortage | None
    buffers: tuple[Buffer, ...]
    seconds: float


def compile_program(
    lowered: "jax.stages.Lowered",
    *,
    trips: Mapping[str, float] | None = None,
    kernels: Mapping[str, float] | None = None,
) -> Compilation:
    """Compiles what `jax.jit(…).lower(…)` gave; the options are those of `program_cost`.

    The compilation cache is left aside: what comes out of it has no plan of its memory. Any error
    but a lack of device memory is raised on.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="jaxconv-hlo-") as folder:
        shortage = compiled = None
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with _without_cache():
                compiled = lowered.compile(compiler_options=options)
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            shortage = shortage_of(error)
            text = _dumped(folder, "after_optimizations.txt")
            if shortage is None or not text:
                raise
        seconds = time.perf_counter() - start
        assignment = _dumped(folder, "after_optimizations-buffer-assignment.txt")
    return Compilation(
        program_cost(text, trips=trips, kernels=kernels),
        memory_of(compiled, assignment) if compiled else planned_memory(assignment),
        shortage,
        tuple(largest_buffers(assignment, parse(text))),
        seconds,
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it goes on as it has begun
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _dumped(folder: str, name: str) -> str:
    """The file of the program itself, which is larger than those of helpers compiled on the way."""
    files = sorted(Path(folder).glob(f"*{name}"), key=lambda path: path.stat().st_size)
    return files[-1].read_text() if files else ""
