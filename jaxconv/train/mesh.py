"""Data parallelism over the devices of this process: the rows of a batch are shared out."""

import contextlib
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"
ROWS = PartitionSpec(None, DATA)
"""Of arrays [micro-batches, rows, ...]: every device has some rows of every micro-batch."""
WHOLE = PartitionSpec()


def split_cpu() -> None:
    """Makes each core a device of its own, up to eight, where CPUs are all there is.

    XLA runs a small model's training step on one core; as data-parallel devices the cores each take
    a share. It must come before the first computation; a process that has computed already keeps
    the devices that it has. `JAX_NUM_CPU_DEVICES` is respected.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(len(os.sched_getaffinity(0)), 8))


def data_mesh(rows: int) -> Mesh:
    """As many local devices as divide `rows`, in one axis."""
    devices = jax.local_devices()
    count = next(n for n in range(len(devices), 0, -1) if rows % n == 0)
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, WHOLE))


def share_rows(batches: Any, mesh: Mesh) -> Any:
    """Arrays [micro-batches, rows, ...] with their rows shared out."""
    return jax.device_put(batches, NamedSharding(mesh, ROWS))
