"""One optimizer step from any number of micro-batches, with one division for the whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxconv.objectives.metrics import Metrics
from jaxconv.train.mesh import DATA, ROWS, WHOLE
from jaxconv.train.state import TrainState

Loss = Callable[..., tuple[jax.Array, jax.Array, Metrics]]
"""(model, micro-batch, *constants) to (sum, denominator, metrics), as every objective returns."""


def accumulate(loss: Loss, model: Any, batches: Any, count: jax.Array, *constants):
    """Gradients of the first `count` micro-batches, summed.

    Args:
        loss: the objective.
        model: differentiated.
        batches: a pytree whose arrays have a leading axis over micro-batches.
        count: int32; what lies behind it is padding and costs nothing.
        *constants: passed on to every micro-batch.

    Returns:
        (gradient of the summed loss, summed denominator, merged metrics).
    """

    def value(model, batch):
        total, denominator, metrics = loss(model, batch, *constants)
        return total, (denominator, metrics)

    gradient = jax.grad(value, has_aux=True)

    def body(i, carry):
        gradients, denominator, metrics = carry
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
        new, (n, m) = gradient(model, batch)
        return jax.tree.map(jnp.add, gradients, new), denominator + n, metrics.merge(m)

    shapes = jax.eval_shape(gradient, model, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    gradients, (denominator, metrics) = zeros
    metrics = Metrics(
        metrics.sums, jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), metrics.maxima)
    )
    return jax.lax.fori_loop(0, count, body, (gradients, denominator, metrics))


def add_up(gradients: Any, denominator: jax.Array, metrics: Metrics):
    """The sums of all devices, inside a `shard_map` over the data axis."""
    return (
        jax.lax.psum(gradients, DATA),
        jax.lax.psum(denominator, DATA),
        Metrics(jax.lax.psum(metrics.sums, DATA), jax.lax.pmax(metrics.maxima, DATA)),
    )


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    scale: Callable[[Any, jax.Array], Any] | None = None,
):
    """A jitted `update(state, batches, count, *constants)` that donates `state`.

    The rows of `batches` are shared out over the mesh; each device adds up its own micro-batches
    and there is one reduction an update.

    It returns `(state, denominator, metrics)`; the metrics are merged but not divided, with
    `gradient_norm` of the mean loss, before clipping, among the maxima.

    Args:
        loss: the objective.
        optimizer: what turns the gradient of the mean loss into an update.
        mesh: of `data_mesh`.
        scale: (a tree like the model, *constants) to the same with parts set to zero that rest for
            a while; applied to gradients and to updates.
    """

    def summed(model, batches, count, *constants):
        def local(model, batches, count, constants):
            return add_up(*accumulate(loss, model, batches, count, *constants))

        return jax.shard_map(
            local, mesh=mesh, in_specs=(WHOLE, ROWS, WHOLE, WHOLE), out_specs=WHOLE, check_vma=False
        )(model, batches, count, constants)

    def update(state: TrainState, batches: Any, count: jax.Array, *constants):
        gradients, denominator, metrics = summed(state.model, batches, count, *constants)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(denominator, 1.0), gradients)
        if scale is not None:
            gradients = scale(gradients, *constants)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
        if scale is not None:
            updates = scale(updates, *constants)  # momentum and decay would move them still
        model = optax.apply_updates(state.model, updates)
        metrics = Metrics(metrics.sums, {**metrics.maxima, "gradient_norm": norm})
        return TrainState(model, opt_state), denominator, metrics

    return jax.jit(update, donate_argnums=(0,))
