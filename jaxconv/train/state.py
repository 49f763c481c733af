"""What training changes: a model and its optimizer's state, one pytree."""

import dataclasses
from typing import Any

import jax
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    model: any NNX module, float32 weights.
    opt_state: of the optax transformation that trains it.
    """

    model: Any
    opt_state: optax.OptState

    @classmethod
    def create(cls, model: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(model, jax.jit(optimizer.init)(model))
