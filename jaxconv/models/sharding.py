"""Where weights live on a device mesh: one table from logical axes to mesh axes.

Mesh axes: `data` (copies of the model), `fsdp` (each weight split over its width and gathered at
use) and `tensor` (heads, MLP and vocabulary split for good).
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxconv.errors import Refused
from jaxconv.models.weights import is_param, logical_axes

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axes that are absent (head_dim, layers) are not split.
RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def device_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices, axes in compiler-propagated (Auto) mode."""
    shape = (data, fsdp, tensor)
    devices = jax.devices()
    wanted = int(np.prod(shape))
    if min(shape) < 1 or wanted > len(devices):
        raise Refused(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {wanted} devices; "
            f"there are {len(devices)}"
        )
    # The default axis type changed between jax versions, so it is always written out.
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted]
    )


def partition_spec(param: nnx.Param, mesh: Mesh, rules: Mapping[str, str] = RULES) -> PartitionSpec:
    """How one weight is split; raises Refused where an axis does not divide evenly."""
    entries = []
    for axis, size in zip(logical_axes(param), param.shape, strict=True):
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
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
