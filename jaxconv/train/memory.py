"""What an update will take of a device's memory, told before the first one runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxconv.perf.memory import memory_of, size
from jaxconv.train import clock
from jaxconv.train.state import TrainState


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        trained: weights that are trained, and their average.
        resting: weights that are only read: the base of an adapter, a reference model.
        optimizer: its state.
        batch: inputs.
        working: activations, gradients and all else that lives inside the update, as the compiler
            has planned it.
    """

    trained: int
    resting: int
    optimizer: int
    batch: int
    working: int

    @property
    def total(self) -> int:
        return self.trained + self.resting + self.optimizer + self.batch + self.working

    def __str__(self) -> str:
        parts = (
            f"{size(self.trained)} of weights",
            *([f"{size(self.resting)} of resting weights"] if self.resting else []),
            f"{size(self.optimizer)} of optimizer state",
            f"{size(self.working)} of activations and gradients",
        )
        return f"an update takes {size(self.total)} of a device: {', '.join(parts)}"


def plan_memory(
    update: Callable[..., Any], state: TrainState, batches: Any, count: jax.Array, *constants
) -> Memory:
    """Compiles a jitted update for these arguments, which the call after it does not do again."""
    compiled = update.lower(state, batches, count, *constants).compile()
    return Memory(
        trained=_bytes((state.model, state.ema)),
        resting=_bytes([x for x in jax.tree.leaves(constants) if x.ndim]),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(batches),
        working=memory_of(compiled).temporaries,
    )


def announce(update: Callable[..., Any], state: TrainState, *arguments) -> None:
    """Prints the plan, once for all processes, and notes it for the report."""
    memory = plan_memory(update, state, *arguments)
    clock.note("memory", planned=memory.total)
    if jax.process_index() == 0:
        print(memory, flush=True)


def device_peak() -> int | None:
    """Most bytes that any device of this process had in use so far; None where the runtime keeps no
    account, as on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def _bytes(tree: Any) -> int:
    """Of one device's part of every array."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") else leaf.shape
        size = leaf.dtype.itemsize
        for n in shape:
            size *= n
        total += size
    return total
