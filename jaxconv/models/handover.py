"""Weights from the layout that is trained to the groups of devices that roll out.

Everything goes from device to device and a layer at a time: besides what comes out, nothing is held
that is larger than a layer, the embedding or the output matrix, all of them in the compute dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import (
    DecodeWeights,
    model_config,
    outer_weights,
    rollout_layer,
    unstack,
)
from jaxconv.models.decoder import Block, Decoder
from jaxconv.models.device_group import DeviceGroup, embedding_rows, head_columns
from jaxconv.models.heads import ActorCritic
from jaxconv.models.lora import AdaptedDecoder
from jaxconv.models.sharding import TENSOR, loosened, on_device, partition_spec
from jaxconv.models.weights import is_param

_ROWS, _COLUMNS = P(TENSOR, None), P(None, TENSOR)
_OUTER = (_ROWS, P(), _COLUMNS, P(), P())
"""How a group splits what is in no layer, in the order of `outer_weights`."""


def hand_over(
    model: Decoder | AdaptedDecoder | ActorCritic, groups: Sequence[DeviceGroup]
) -> dict[DeviceGroup, DecodeWeights]:
    """A model's weights in rollout layout, one copy for each of these groups of this process.

    Of several processes all have to call it, for the same model and groups of the same size.

    Args:
        model: on one device, copied to several, or split over a mesh; an adapter is merged.
        groups: of one size.
    """
    groups = list(dict.fromkeys(groups))
    tensor = len(groups[0].devices)
    if tensor == 1:
        weights = unstack(model)
        return {group: on_device(weights, group.devices[0]) for group in groups}
    model = loosened(model)
    config = model_config(model)
    mesh = _mesh_of_groups(model, groups)

    def give(tree: Any, specs: Any) -> list[Any]:
        """A part of the model to each group."""
        if mesh is not None:
            tree = _reshard(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        return [
            jax.tree.map(lambda x, spec, g=group: _take(x, g.sharding(spec)), tree, specs)
            for group in groups
        ]

    split = mesh is not None
    outer = give(_padded(outer_weights(model, split=split), config, tensor, mesh), _OUTER)
    layers = []
    for index in range(config.num_layers):
        layer = rollout_layer(model, index, split=split)
        layers.append(give(layer, _layer_specs(layer, groups[0].mesh)))
    given = {}
    for group, (embed, *rest), *of_layers in zip(groups, outer, *layers, strict=True):
        given[group] = DecodeWeights(embed, tuple(of_layers), *rest)
    return given


def abstract_weights(config: DecoderConfig, group: DeviceGroup) -> DecodeWeights:
    """Shapes, dtypes and shardings of what `hand_over` gives a group, of which nothing is made."""
    layer = jax.eval_shape(lambda: Block(config, jax.random.key(0)))
    tensor, width, dtype = len(group.devices), config.embed_dim, config.dtype

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=group.sharding(spec))

    split = group.mesh is not None
    specs = _layer_specs(layer, group.mesh) if split else jax.tree.map(lambda _: P(), layer)
    layer = jax.tree.map(lambda w, spec: array(w.shape, dtype, spec), layer, specs)
    return DecodeWeights(
        embed=array((embedding_rows(config.vocab_size, tensor), width), dtype, _ROWS),
        layers=(layer,) * config.num_layers,
        final_norm=array((width,), dtype, P()),
        head=array((width, head_columns(config.vocab_size, tensor)), dtype, _COLUMNS),
        value_kernel=array((width,), jnp.float32, P()),
        value_bias=array((), jnp.float32, P()),
    )


def _layer_specs(layer: Block, mesh: Mesh) -> Block:
    """How a group splits a layer: a tree like it, of specifications."""

    def specs(param):
        spec = partition_spec(param, mesh)
        return jax.tree.map(lambda _: spec, param)

    return jax.tree.map(specs, layer, is_leaf=is_param)


def _mesh_of_groups(model: Any, groups: Sequence[DeviceGroup]) -> Mesh | None:
    """All devices of the model, one row a group; None where the groups are not those devices.

    The groups of other processes are taken to be neighbours there, as in `device_groups`.
    """
    held = jax.tree.leaves(model)[0].sharding.device_set
    size = len(groups[0].devices)
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    if held != set(jax.devices()) or any(len(d) % size for d in by_process.values()):
        return None
    rows = [tuple(d[i : i + size]) for d in by_process.values() for i in range(0, len(d), size)]
    if not {group.devices for group in groups} <= set(rows):
        return None
    return Mesh(np.array(rows), ("replica", TENSOR), axis_types=(AxisType.Auto,) * 2)


def _reshard(tree: Any, shardings: Any) -> Any:
    """The same arrays, split otherwise over the same devices."""
    leaves, structure = jax.tree.flatten(tree)
    wanted = tuple(jax.tree.leaves(shardings))

    def in_order(x: jax.Array, where: NamedSharding) -> jax.Array:
        # One program cannot tell of two orders of the devices.
        same = list(x.sharding.mesh.devices.flat) == list(where.mesh.devices.flat)
        return x if same else jax.device_put(x, where)

    leaves = tuple(map(in_order, leaves, wanted))
    return jax.tree.unflatten(structure, _constrained(leaves, wanted))


@functools.partial(jax.jit, static_argnums=1)
def _constrained(leaves: tuple[jax.Array, ...], wanted: tuple[NamedSharding, ...]):
    return jax.lax.with_sharding_constraint(leaves, wanted)


def _padded(outer: tuple, config: DecoderConfig, tensor: int, mesh: Mesh | None) -> tuple:
    """`outer_weights` with a vocabulary that comes out even on a group."""
    embed, norm, head, kernel, bias = outer
    if mesh is not None and config.embed_dim % tensor == 0:
        # Split over the width as it is padded, so that no device ever has all of it.
        embed, head = _reshard(
            (embed, head), (NamedSharding(mesh, _COLUMNS), NamedSharding(mesh, _ROWS))
        )
    rows = embedding_rows(config.vocab_size, tensor) - config.vocab_size
    columns = head_columns(config.vocab_size, tensor) - config.vocab_size
    embed, head = _with_zeros(embed, head, rows, columns)
    return embed, norm, head, kernel, bias


@functools.partial(jax.jit, static_argnums=(2, 3))
def _with_zeros(embed_VD: jax.Array, head_DV: jax.Array, rows: int, columns: int):
    """More rows and columns; split as they were."""
    return jnp.pad(embed_VD, ((0, rows), (0, 0))), jnp.pad(head_DV, ((0, 0), (0, columns)))


def _take(x: jax.Array, sharding: Sharding) -> jax.Array:
    """x on devices of this process, without the host.

    A device that has its part already gives it as it is; others get theirs from one that has all.
    """
    held = {shard.device: shard for shard in x.addressable_shards}
    whole = next((s.data for s in held.values() if s.data.shape == x.shape), None)

    def part(device: jax.Device, index: tuple[slice, ...]) -> jax.Array:
        wanted = _ranges(index, x.shape)
        here = held.get(device)
        if here is not None and _ranges(here.index, x.shape) == wanted:
            return here.data
        source = here.data if here is not None and here.data.shape == x.shape else whole
        if source is None:
            raise ValueError(f"no device has all of an array {x.shape} that {device} needs some of")
        starts, limits = zip(*wanted, strict=True) if wanted else ((), ())
        return jax.device_put(_slice(source, starts, limits), device)

    places = sharding.addressable_devices_indices_map(x.shape)
    parts = [part(device, index) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


# By itself it would send where it begins to the device.
_slice = jax.jit(jax.lax.slice, static_argnums=(1, 2))


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, end) along each axis."""
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
