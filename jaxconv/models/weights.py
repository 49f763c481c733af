"""One declaration a weight: initial values, logical axes, and its place in a checkpoint.

Everything rides on the `nnx.Param` as metadata, so that initialisation, sharding, abstract trees,
import and export read one source.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]

_LOOKED_UP = ("vocab", "positions", "types", "buckets")
"""Logical axes over rows that are looked up: a table stays a matrix in a checkpoint."""


def normal(std: float) -> Initializer:
    """Gaussian of mean 0, float32."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def weight(
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    axes: tuple[str | None, ...],
    hf: str,
    init: Initializer,
    inputs: int = 0,
) -> nnx.Param:
    """Declares one float32 weight.

    Args:
        key: typed PRNG key for `init`.
        shape: shape of one layer's weight; stacking layers puts an axis in front.
        axes: logical name of each axis, read by `sharding.py`.
        hf: tensor name in a Hugging Face checkpoint; "{layer}" stands for the layer's index.
        init: initial values.
        inputs: how many leading axes are contracted with the activation. The checkpoint holds a
            linear map as [outputs, inputs], so such a weight is flattened to a matrix and
            transposed; 0 means that values are stored in our order (embeddings, norms, biases).
    """
    if len(axes) != len(shape):
        raise ValueError(f"{hf}: {len(axes)} axes {axes} for shape {shape}")
    return nnx.Param(init(key, shape), axes=axes, hf=hf, inputs=inputs)


def named_weights(model: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """(dotted path, Param) of every weight of `model`, real or abstract, in tree order."""
    for path, param in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_param):
        yield ".".join(str(entry.name) for entry in path), param


def is_param(node: object) -> bool:
    """For `is_leaf` of `jax.tree` functions that need the metadata of weights."""
    return isinstance(node, nnx.Param)


def is_stacked(param: nnx.Param) -> bool:
    """Whether the value has a leading axis over layers."""
    return len(param.shape) == len(param.get_metadata("axes")) + 1


def logical_axes(param: nnx.Param) -> tuple[str | None, ...]:
    """Logical name of each axis of the value, the layer axis included."""
    axes = param.get_metadata("axes")
    return ("layers", *axes) if is_stacked(param) else axes


def hf_shape(param: nnx.Param) -> tuple[int, ...]:
    """Shape of one of this weight's tensors in a checkpoint."""
    shape = param.shape[1:] if is_stacked(param) else param.shape
    inputs = param.get_metadata("inputs")
    if inputs:
        return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
    is_table = param.get_metadata("axes")[0] in _LOOKED_UP
    return shape if is_table else (int(np.prod(shape)),)


def hf_names(param: nnx.Param) -> list[str]:
    """Tensor names in a checkpoint, one for each layer, in layer order."""
    name = param.get_metadata("hf")
    return [name.format(layer=i) for i in range(param.shape[0])] if is_stacked(param) else [name]


def to_hf(param: nnx.Param, layer: np.ndarray) -> np.ndarray:
    """One layer's values, our layout to the checkpoint's (a view where possible)."""
    inputs = param.get_metadata("inputs")
    if inputs:
        rows = int(np.prod(layer.shape[:inputs]))
        return layer.reshape(rows, -1).T
    return layer.reshape(hf_shape(param))


def from_hf(param: nnx.Param, tensor: np.ndarray) -> np.ndarray:
    """One checkpoint tensor in our layout (a view where possible); the inverse of `to_hf`."""
    shape = param.shape[1:] if is_stacked(param) else param.shape
    return (tensor.T if param.get_metadata("inputs") else tensor).reshape(shape)
