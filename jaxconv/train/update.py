"""One optimizer step from any number of micro-batches, with one division for the whole batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxconv.models.sharding import DATA, is_split
from jaxconv.objectives.metrics import Metrics
from jaxconv.train.mesh import ROWS, WHOLE, on, over_rows
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
    gradients = jax.tree.map(jnp.zeros_like, model)  # split as the weights are
    denominator, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1])
    lowest = jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), metrics.maxima)
    metrics = dataclasses.replace(metrics, maxima=lowest)
    return jax.lax.fori_loop(0, count, body, (gradients, denominator, metrics))


def add_up(gradients: Any, denominator: jax.Array, metrics: Metrics):
    """The sums of all devices, inside a `shard_map` over the data axis."""
    return (
        jax.lax.psum(gradients, DATA),
        jax.lax.psum(denominator, DATA),
        Metrics(
            jax.lax.psum(metrics.sums, DATA),
            jax.lax.pmax(metrics.maxima, DATA),
            {
                name: spread.across(lambda x: jax.lax.psum(x, DATA))
                for name, spread in metrics.spreads.items()
            },
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Updated:
    """What an update says of itself, on the device until somebody asks.

    Attributes:
        denominator: float32, of the whole batch.
        metrics: merged but not divided; `gradient_norm` of the mean loss, before clipping, is among
            the maxima.
        finite: bool [tensors], whether each tensor of `tensor_names` is. The squares of large
            gradients may overflow in their norm though each gradient is finite: then it is the
            entry of the largest tensor that is False.
    """

    denominator: jax.Array
    metrics: Metrics
    finite: jax.Array


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    scale: Callable[[Any, jax.Array], Any] | None = None,
    *,
    ema_decay: float = 0.0,
):
    """A jitted `update(state, batches, count, *constants) -> (state, Updated)` that donates
    `state`.

    The rows of `batches` are shared out over the mesh; each device adds up its own micro-batches
    and there is one reduction an update.

    Args:
        loss: the objective.
        optimizer: what turns the gradient of the mean loss into an update.
        mesh: of `training_mesh`.
        scale: (a tree like the model, *constants) to the same with parts set to zero that rest for
            a while; applied to gradients and to updates.
        ema_decay: of the average in `state.ema`, where there is one.
    """

    def summed(model, batches, count, *constants):
        def local(model, batches, count, constants):
            found = accumulate(loss, model, batches, count, *constants)
            return found if is_split(mesh) else add_up(*found)

        run = over_rows(local, mesh, (WHOLE, ROWS, WHOLE, WHOLE), WHOLE)
        return run(model, batches, count, constants)

    def update(state: TrainState, batches: Any, count: jax.Array, *constants):
        with on(mesh):
            return update_on_mesh(state, batches, count, *constants)

    def update_on_mesh(state: TrainState, batches: Any, count: jax.Array, *constants):
        with jax.named_scope("gradients"):
            gradients, denominator, metrics = summed(state.model, batches, count, *constants)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(denominator, 1.0), gradients)
        if scale is not None:
            gradients = scale(gradients, *constants)
        norm = optax.tree.norm(gradients)
        with jax.named_scope("optimizer"):
            updates, opt_state = _propagated(optimizer.update, mesh, state)(
                gradients, state.opt_state, state.model
            )
        if scale is not None:
            updates = scale(updates, *constants)  # momentum and decay would move them still
        with jax.named_scope("optimizer"):
            model = optax.apply_updates(state.model, updates)
        average = state.ema
        if average is not None:
            with jax.named_scope("average"):
                average = optax.incremental_update(model, average, 1.0 - ema_decay)
        sums = [metrics.sums[name] for name in _loss_first(metrics)]
        state = TrainState(model, opt_state, average)
        with jax.named_scope("finite"):
            finite = [
                *_finite((sums, gradients)),
                *_norm_is_finite(norm, gradients),
                *_finite((model, _floating(opt_state), average)),
            ]
        maxima = {**metrics.maxima, "gradient_norm": norm}
        metrics = dataclasses.replace(metrics, maxima=maxima)
        return state, Updated(denominator, metrics, jnp.stack(finite))

    return jax.jit(update, donate_argnums=(0,))


def _propagated(optimizer_update: Callable, mesh: Mesh, state: TrainState) -> Callable:
    """An optimizer's update of split weights, in which the compiler decides what devices exchange:
    Muon multiplies matrices, Adafactor sums rows, and neither says how over devices."""
    if not is_split(mesh):
        return optimizer_update
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state.model, state.opt_state))
    return jax.sharding.auto_axes(optimizer_update, out_sharding=specs)


def tensor_names(metrics: Metrics, state: TrainState) -> list[str]:
    """Names of what `Updated.finite` tells of, in the order in which an update computes it."""
    weights = _names(state.model)
    return [
        *(f"the sum of {name}" for name in _loss_first(metrics)),
        *(f"the gradient of {w}" for w in weights),
        *(f"the gradient norm (largest in {w})" for w in weights),
        *(f"the weight {w}" for w in weights),
        *(f"the optimizer state {name}" for name in _names(_floating(state.opt_state))),
        *(f"the average of {w}" for w in _names(state.ema)),
    ]


def _names(tree: Any) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return [name.removesuffix("/value") for name in names]


def _floating(tree: Any) -> Any:
    """Without the counters of updates."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _finite(tree: Any) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]


def _norm_is_finite(norm: jax.Array, gradients: Any) -> list[jax.Array]:
    """For each gradient, whether it is not the one to name for a norm that overflowed."""
    sizes = jnp.stack([jnp.max(jnp.abs(g), initial=0.0) for g in jax.tree.leaves(gradients)])
    overflowed = jnp.isfinite(sizes).all() & ~jnp.isfinite(norm)
    return list(~(overflowed & (jnp.arange(len(sizes)) == jnp.argmax(sizes))))


def _loss_first(metrics: Metrics) -> list[str]:
    """Names of the sums; what is minimised tells more than what is only watched."""
    return sorted(metrics.sums, key=lambda name: (name not in ("loss", "nll"), name))
