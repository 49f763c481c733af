"""What training changes: what is trained, its optimizer's state and its average; one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxconv.models.sharding import is_split
from jaxconv.train.mesh import place, placed, replicate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    model: what is trained, float32: a whole NNX module, or the adapter of one whose base rests.
    opt_state: of the optax transformation that trains it.
    ema: moving average of `model`, or None.
    """

    model: Any
    opt_state: optax.OptState
    ema: Any = None

    @classmethod
    def create(
        cls,
        model: Any,
        optimizer: optax.GradientTransformation,
        *,
        ema: bool = False,
        mesh: Mesh | None = None,
    ) -> "TrainState":
        """The state before the first update, with an average that starts at `model` if asked.

        With a mesh `model` goes there first, and what else there is follows it.
        """

        begin = jax.jit(_begin(optimizer, ema))
        if mesh is None:
            return cls(model, *begin(model))
        model = place(model, mesh)
        if not is_split(mesh):
            return cls(model, *replicate(begin(model), mesh))
        # A state that begins as zeros reads nothing of the model that would tell where it belongs.
        with jax.set_mesh(mesh):
            return cls(model, *begin(model))

    @classmethod
    def shapes(
        cls, model: Any, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool = False
    ) -> "TrainState":
        """What `create` gives on a mesh, as `jax.ShapeDtypeStruct`s where they lie.

        Args:
            model: shapes of what is trained.
            optimizer, mesh, ema: as of `create`.
        """
        model = placed(model, mesh)
        if not is_split(mesh):
            return cls(model, *placed(jax.eval_shape(_begin(optimizer, ema), model), mesh))

        def put(x):
            sharding = NamedSharding(mesh, x.sharding.spec if x.sharding else PartitionSpec())
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            begun = jax.eval_shape(_begin(optimizer, ema), model)
        return cls(model, *jax.tree.map(put, begun))

    @property
    def averaged(self) -> Any:
        """What is evaluated and exported: the average where there is one."""
        return self.model if self.ema is None else self.ema


def _begin(optimizer: optax.GradientTransformation, ema: bool):
    """(optimizer state, average or None) of the weights that training begins with."""
    return lambda model: (optimizer.init(model), jax.tree.map(jnp.copy, model) if ema else None)
