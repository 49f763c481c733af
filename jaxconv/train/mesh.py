"""The devices of a run: who has which rows of a batch, and which part of a model.

They are those of all its processes, each of which gives the same number and brings its own rows.

Under the strategy `ddp` every device has the whole model: each adds up its own micro-batches, and
there is one reduction an update. Under `fsdp` and `fsdp_tp` the model is split as well; its code
reads from the types of its weights what devices have to tell each other (`models.sharding`).
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxconv import processes
from jaxconv.data.batches import Share
from jaxconv.errors import Refused
from jaxconv.models.sharding import (
    DATA,
    STRATEGIES,
    TENSOR,
    device_mesh,
    is_split,
    partition_spec,
    row_axes,
)
from jaxconv.models.weights import is_param
from jaxconv.train.config import config_value

ROWS = PartitionSpec(None, DATA)
"""Of arrays [micro-batches, rows, ...] where devices have whole models: each has some rows of every
micro-batch."""
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


def check_section(config) -> None:
    """Refuses what cannot be in the section `mesh`, whatever the devices."""
    m = config.mesh
    if m.strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise Refused(f"config.mesh.strategy={m.strategy!r}; it may be {known}")
    for name in ("data", "tensor"):
        if m[name] < 1:
            raise Refused(f"config.mesh.{name}={m[name]}; it must be at least 1")
    if m.strategy != "fsdp_tp" and m.tensor != 1:
        raise Refused(f"config.mesh.tensor={m.tensor}; it must be 1 with strategy {m.strategy!r}")
    if m.strategy == "ddp" and m.data != 1:
        raise Refused(
            f"config.mesh.data={m.data}; it must be 1 with strategy 'ddp', which takes as many "
            "devices as divide the rows"
        )


def training_mesh(config, rows: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that the section `mesh` of a config asks for.

    Under `ddp` it has as many devices as divide `rows`, the rows of a micro-batch; otherwise all.

    Args:
        config: with the section `mesh`.
        rows: of a micro-batch.
        devices: of all processes; those of this run if not given.

    Raises:
        Refused: sizes that do not go together, or with the devices there are.
    """
    mesh = split_mesh(config, devices)
    if mesh is None:
        return data_mesh(rows, devices)
    if rows % parts(mesh):
        raise Refused(
            f"{rows} rows of a micro-batch for {parts(mesh)} parts of the mesh; it must "
            "be a multiple"
        )
    return mesh


def split_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of a strategy that splits the model, which has all devices; None for `ddp`.

    Args:
        config, devices: as of `training_mesh`.

    Raises:
        Refused: sizes that do not go with the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    m, n = config.mesh, len(devices)
    if m.strategy == "ddp":
        return None
    if n % (m.data * m.tensor):
        raise Refused(
            f"config.mesh.data={m.data} and config.mesh.tensor={m.tensor}; their product must "
            f"divide the {n} devices"
        )
    fsdp = n // (m.data * m.tensor)
    return device_mesh(data=m.data, fsdp=fsdp, tensor=m.tensor, devices=devices)


def data_mesh(rows: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """As many devices of every process as get equal shares of `rows`, in one axis.

    The axis is not Explicit: it is manual, in the `shard_map` of `over_rows`, wherever it is used.

    Args:
        rows: of a micro-batch.
        devices: as of `training_mesh`.

    Raises:
        Refused: not even the processes get equal shares.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices() if devices is None else devices:
        by_process.setdefault(device.process_index, []).append(device)
    everybody = len(by_process)
    count = _sharing(rows, len(by_process[min(by_process)]), everybody)
    if not count:
        raise Refused(
            f"{rows} rows of a micro-batch for {everybody} processes; it must be a multiple"
        )
    chosen = [device for process in sorted(by_process) for device in by_process[process][:count]]
    shape = (count * everybody,)
    return jax.make_mesh(shape, (DATA,), axis_types=(AxisType.Auto,), devices=chosen)


def refuse_idle(mesh: Mesh, devices: Sequence[jax.Device], field: str, rows: int) -> None:
    """Refuses to plan for devices of which some are left out; libtpu compiles for all of them."""
    if mesh.size < len(devices):
        raise Refused(
            f"config.{field}={rows} leaves {len(devices) - mesh.size} of {len(devices)} devices "
            f"idle; with --compile_for it must be a multiple of {len(devices)}"
        )


def over_rows(
    call: Callable, mesh: Mesh, in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec
) -> Callable:
    """`call` on each device's rows, or on all rows at once where the model is split.

    `in_specs` and `out_specs` are `ROWS` or `WHOLE`. What is `WHOLE` and comes out of a device's
    rows, `call` must have added up over `DATA` unless the model `is_split`.
    """
    if is_split(mesh):
        return call
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def tell_of_idle_devices(config, *fields: str) -> list[str]:
    """Prints, and returns for the report, a line for each of these fields with rows that leave
    devices out of their `data_mesh`."""
    everybody = processes.count()
    devices = len(jax.local_devices()) * everybody
    lines = []
    for field in fields:
        rows = config_value(config, field)
        if rows % everybody:
            raise Refused(
                f"config.{field}={rows}; it must be a multiple of the number of processes, "
                f"{everybody}"
            )
        if idle := devices - _sharing(rows, len(jax.local_devices()), everybody) * everybody:
            lines.append(
                f"{idle} of {devices} devices are idle: config.{field}={rows} is shared out to "
                f"{devices - idle}; a multiple of {devices} would keep all of them busy."
            )
            processes.say(lines[-1])
    return lines


def _sharing(rows: int, local: int, everybody: int) -> int:
    """How many of the `local` devices of each process get equal shares of so many rows; 0: no
    number does."""
    return next((n for n in range(local, 0, -1) if rows % (n * everybody) == 0), 0)


def place(tree: Any, mesh: Mesh) -> Any:
    """Weights split over the mesh by its axes; every other array or host number on every device.

    Of several processes each has all of what does not come from the mesh, the same as the others.
    """

    def put(leaf):
        spec = partition_spec(leaf, mesh) if is_param(leaf) else WHOLE
        return _put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree, is_leaf=is_param)


def placed(tree: Any, mesh: Mesh) -> Any:
    """What `place` would give, as shapes: a tree of `jax.ShapeDtypeStruct`s where they lie."""

    def put(leaf):
        spec = partition_spec(leaf, mesh) if is_param(leaf) else WHOLE
        return jax.tree.map(lambda x: _shaped(x, NamedSharding(mesh, spec)), leaf)

    return jax.tree.map(put, tree, is_leaf=is_param)


def placed_rows(batches: Any, mesh: Mesh) -> Any:
    """What `share_rows` would give of batches with the rows of all processes, as shapes."""
    return jax.tree.map(lambda x: _shaped(x, _of_rows(mesh)), batches)


def _shaped(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array or host number on every device of the mesh; see `place`."""
    return _put(tree, NamedSharding(mesh, WHOLE))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            if x.sharding.device_set == sharding.device_set:
                return jax.device_put(x, sharding)
            # Only where devices have whole models a mesh leaves some of them out.
            copy = x.addressable_data(0)
            return _assemble(x.shape, sharding, lambda part: copy[part])
        # `device_put` would send the whole array around, to see whether all have the same.
        host = np.asarray(x)
        return _assemble(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(put, tree)


def share_rows(batches: Any, mesh: Mesh) -> Any:
    """Arrays [micro-batches, rows, ...] with their rows shared out.

    Of several processes each brings its own; see `share_of`.
    """
    sharding = _of_rows(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batches, sharding)
    shares = parts(mesh)
    here = len(share_of(mesh, shares).own)

    def put(x):
        shape = (x.shape[0], x.shape[1] // here * shares, *x.shape[2:])
        own = share_of(mesh, shape[1]).own

        def part(index):
            begin = np.searchsorted(own, index[1].start or 0)
            end = begin + len(range(*index[1].indices(shape[1])))
            return x[:, begin:end]

        return _assemble(shape, sharding, part)

    return jax.tree.map(put, batches)


def share_whole(batches: Any, mesh: Mesh) -> Any:
    """Like `share_rows`, where every process has made all the rows."""
    sharding = _of_rows(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batches, sharding)
    return jax.tree.map(lambda x: _assemble(x.shape, sharding, lambda part: x[part]), batches)


def _assemble(
    shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[Any], np.ndarray | jax.Array]
) -> jax.Array:
    """An array of several processes; `part` gives what lies at an index of it."""
    places = sharding.addressable_devices_indices_map(shape)
    parts = [jax.device_put(part(index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def share_of(mesh: Mesh, rows: int) -> Share:
    """The rows of a micro-batch that lie on devices of this process."""
    parts = _of_rows(mesh).addressable_devices_indices_map((1, rows)).values()
    held = np.unique([row for _, part in parts for row in range(*part.indices(rows))])
    return Share(rows, processes.index(), processes.count(), held)


def parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a micro-batch are cut."""
    return mesh.size // mesh.shape.get(TENSOR, 1)


def _of_rows(mesh: Mesh) -> NamedSharding:
    spec = PartitionSpec(None, row_axes(mesh)) if is_split(mesh) else ROWS
    return NamedSharding(mesh, spec)


def on(mesh: Mesh) -> contextlib.AbstractContextManager:
    """The context in which code that reads how arrays are split is traced."""
    if not is_split(mesh):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
