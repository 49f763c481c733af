"""Where weights live on a device mesh, and how a layer uses a weight that lives on several devices.

Mesh axes: `data` (copies of the model), `fsdp` (each weight split over its width and gathered where
it is used) and `tensor` (heads, MLP and vocabulary split for good). A strategy is one small table
from logical axes to mesh axes. Axes are Explicit: the type of an array tells how it is split, an
operation that could be split in two ways is an error when it is traced, and the model's code reads
the types instead of being told.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxconv.errors import Refused
from jaxconv.models.weights import is_param, logical_axes

DATA, FSDP, TENSOR = MESH_AXES = ("data", "fsdp", "tensor")

# Logical axes that are absent (head_dim, layers) are not split.
_SPLIT_FOR_GOOD = {"vocab": TENSOR, "heads": TENSOR, "kv_heads": TENSOR, "mlp": TENSOR}
STRATEGIES: Mapping[str, Mapping[str, str]] = {
    "ddp": {},
    "fsdp": {"embed": FSDP},
    "fsdp_tp": {"embed": FSDP, **_SPLIT_FOR_GOOD},
}
RULES = STRATEGIES["fsdp_tp"]
"""The widest table; on a mesh without an axis nothing is split over it."""


def device_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the first data * fsdp * tensor of `devices`, by default all of every process."""
    shape = (data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    wanted = int(np.prod(shape))
    if min(shape) < 1 or wanted > len(devices):
        raise Refused(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {wanted} devices; "
            f"there are {len(devices)}"
        )
    # The default axis type changed between jax versions, so it is always written out.
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[:wanted]
    )


def partition_spec(param: nnx.Param, mesh: Mesh, rules: Mapping[str, str] = RULES) -> PartitionSpec:
    """How one weight is split; raises Refused where an axis does not divide evenly.

    What has the width as its only named axis (a norm, a head of one number) stays whole: gathering
    it would take longer than it is worth.
    """
    axes = logical_axes(param)
    if {axis for axis in axes if axis not in (None, "layers")} == {"embed"}:
        return PartitionSpec(*(None for _ in axes))
    entries = []
    for axis, size in zip(axes, param.shape, strict=True):
        mesh_axis = rules.get(axis) if axis is not None else None
        parts = mesh.shape.get(mesh_axis, 1)
        if size % parts:
            raise Refused(
                f"{param.get_metadata('hf')}: {axis} is {size}; mesh axis {mesh_axis} has {parts} "
                "devices, which must divide it"
            )
        entries.append(mesh_axis if parts > 1 else None)
    return PartitionSpec(*entries)


def shardings(model: nnx.Module, mesh: Mesh, rules: Mapping[str, str] = RULES) -> nnx.Module:
    """A tree like `model` (real or abstract) that holds a NamedSharding for each weight."""

    def place(param: nnx.Param) -> nnx.Param:
        named = NamedSharding(mesh, partition_spec(param, mesh, rules))
        return jax.tree.map(lambda _: named, param)

    return jax.tree.map(place, model, is_leaf=is_param)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which the rows of a batch are shared out; one of size 1 says nothing."""
    return tuple(axis for axis in (DATA, FSDP) if mesh.shape[axis] > 1)


def is_split(mesh: Mesh) -> bool:
    """Whether a device of the mesh has less than the whole model."""
    return mesh.shape.get(FSDP, 1) * mesh.shape.get(TENSOR, 1) > 1


def loosened(tree: Any) -> Any:
    """The same arrays on a mesh that leaves everything to the compiler; nothing is copied.

    For code that is not written for Explicit axes: merging an adapter, export, evaluation.
    """

    def loosen(x: jax.Array) -> jax.Array:
        mesh = getattr(x.sharding, "mesh", None)
        if mesh is None or not mesh.explicit_axes:
            return x
        auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
        return jax.device_put(x, NamedSharding(auto, x.sharding.spec))

    return jax.tree.map(loosen, tree)


def for_host(tree: Any) -> Any:
    """The same arrays so that every process can read all of them; they stay on the devices.

    Of several processes all have to call it, for the same arrays.
    """

    def reach(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return _gather(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)

    return jax.tree.map(reach, tree)


@functools.cache
def _gather(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=whole)


def on_device(tree: Any, device: jax.Device) -> Any:
    """The copies on one device of arrays that may be whole on several, without the host."""

    def take(x: jax.Array) -> jax.Array:
        whole = {s.device: s.data for s in x.addressable_shards if s.data.shape == x.shape}
        if device in whole:
            return whole[device]
        # An array of several processes cannot go where not all of it is at hand.
        return jax.device_put(x if x.is_fully_addressable else next(iter(whole.values())), device)

    return jax.tree.map(take, tree)


# ---------------------------------------------------------------- in the model's code


def spec_of(x: jax.Array) -> PartitionSpec:
    """How the type of an array splits it; all None where there is no mesh."""
    return jax.typeof(x).sharding.spec


def project(x: jax.Array, w: jax.Array, *, inputs: int = 1) -> jax.Array:
    """x [..., D] through a weight, in x's dtype, [..., F]; see `project_all`."""
    return project_all(x, w, inputs=inputs)[0]


def project_all(x: jax.Array, *weights: jax.Array, inputs: int = 1) -> tuple[jax.Array, ...]:
    """x [..., D] through several weights that are split alike, in x's dtype, [..., F] each.

    Devices gather the weights along `fsdp` while they use them, and add up their parts where
    `tensor` splits D. Of a weight's gradient each device gets the sum of its own part; what the
    weights send back to x is added up first and exchanged once.

    Args:
        x: [..., D], rows split or not; D split where that of the weights is.
        weights: any float [D, ...], or of several leading axes that make up D.
        inputs: how many.
    """
    weights = tuple(w.astype(x.dtype) for w in weights)
    rows, splits = spec_of(x), [spec_of(w) for w in weights]
    if not any(rows) and not any(splits[0]):
        return tuple(_matmul(x, w) for w in weights)
    within = TENSOR in splits[0][:inputs]
    across = TENSOR in splits[0][inputs:]

    def local(x, *weights):
        if across:
            x = jax.lax.pcast(x, TENSOR, to="varying")

        def through(w, split):
            # First, so that of the gradient only this device's part is summed over other axes.
            w = jax.lax.pcast(w, tuple(_names(rows) - _names(split)), to="varying")
            if FSDP in split:
                w = jax.lax.all_gather(w, FSDP, axis=split.index(FSDP), tiled=True)
            y = _matmul(x, w)
            return jax.lax.psum(y, TENSOR) if within else y

        return tuple(map(through, weights, splits))

    out = PartitionSpec(*rows[:-1], TENSOR if across else None)
    return jax.shard_map(local, in_specs=(rows, *splits), out_specs=(out,) * len(weights))(
        x, *weights
    )


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] through w [D, ...], flat: over rows and positions as two axes the backward pass
    costs a training step on a CPU a fifth more."""
    width = x.shape[-1]
    flat = x.reshape(-1, width) @ w.reshape(width, -1)
    return flat.reshape(*x.shape[:-1], -1)


def _names(spec: PartitionSpec) -> set[str]:
    """The mesh axes of a spec."""
    entries = ((entry,) if isinstance(entry, str) else entry for entry in spec if entry)
    return {axis for entry in entries for axis in entry}


def all_but_gathered(primitive, *_, **__) -> bool:
    """A policy of `jax.checkpoint` that keeps everything but gathered weights and their shapes."""
    return primitive.name not in ("all_gather", "reshape")


def look_up(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [..., D] of a table at int ids [...], split over devices as the ids are.

    Devices look up what they hold of the table and exchange what they found; the table itself, and
    its gradient, stay where they are.
    """
    vocab, width = spec_of(table_VD)
    if vocab is None and width is None:
        return table_VD[ids]
    rows = spec_of(ids)

    def local(table_VD, ids):
        if width is not None:
            ids = jax.lax.all_gather(ids, width, axis=0, tiled=True)
        if vocab is None:
            found = table_VD[ids]
        else:
            here = ids - jax.lax.axis_index(vocab) * table_VD.shape[0]
            inside = (here >= 0) & (here < table_VD.shape[0])
            found = jnp.where(inside[..., None], table_VD[jnp.where(inside, here, 0)], 0)
            found = jax.lax.psum(found, vocab)
        if width is not None:
            last = found.ndim - 1
            found = jax.lax.all_to_all(found, width, split_axis=0, concat_axis=last, tiled=True)
        return found

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(vocab, width), rows),
        out_specs=PartitionSpec(*rows, None),
    )(table_VD, ids)


def reshape_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """x in the shape of `like`, and split as it is."""
    spec = spec_of(like)
    return jax.lax.reshape(x, like.shape, out_sharding=spec if any(spec) else None)


def on_each_device(call: Callable, *arrays: jax.Array, results: int = 1) -> Any:
    """call(*arrays) of each device's parts, where none needs another's.

    One result is split as the first array; several are a tuple, split as so many of the first
    arrays. Every other array is split along the same mesh axes or whole.
    """
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return call(*arrays)
    specs = tuple(spec_of(x) for x in arrays)
    out_specs = specs[0] if results == 1 else specs[:results]
    # Of all axes of the mesh: a Pallas kernel is not for the compiler to split.
    return jax.shard_map(call, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)
