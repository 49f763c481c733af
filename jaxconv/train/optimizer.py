"""Optimizers and learning-rate schedules from a config section."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxconv.errors import Refused
from jaxconv.models.weights import is_param, is_stacked

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adafactor", "muon")

# With it an update of Muon is as large as one of AdamW, whose learning rates and decays carry over
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_ADAM_RMS = 0.2


def make_schedule(learning_rate: float, *, kind: str, steps: int, warmup: int) -> optax.Schedule:
    """Learning rate by update.

    Args:
        learning_rate: peak.
        kind: "constant", "cosine" (to a tenth of the peak) or "linear" (to 0), each after a linear
            warm-up.
        steps: updates in all.
        warmup: updates until the peak.
    """
    if kind not in SCHEDULES:
        raise Refused(f"schedule={kind!r}; it may be {', '.join(map(repr, SCHEDULES))}")
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, warmup, max(steps, warmup + 1), end_value=learning_rate / 10
        )
    up = optax.linear_schedule(0.0 if warmup else learning_rate, learning_rate, warmup)
    if kind == "constant":
        return up
    down = optax.linear_schedule(learning_rate, 0.0, max(steps - warmup, 1))
    return optax.join_schedules([up, down], [warmup])


def rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """float32 [steps], the learning rate of every update, on the host."""
    return jax.device_get(jax.vmap(schedule)(jnp.arange(steps)))


def make_optimizer(
    schedule: optax.Schedule,
    *,
    kind: str = "adamw",
    b2: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """An optimizer behind clipping by the global norm.

    Args:
        schedule: learning rate by update.
        kind: "adamw" (Loshchilov & Hutter 2019); "adafactor" (Shazeer & Stern 2018) without first
            moment, whose second moment takes the memory of a row and a column of each large matrix;
            "muon" (Jordan et al. 2024) for the matrices inside the layers and those of adapters,
            with Nesterov's AdamW for all else.
        b2: decay of the second moment; Adafactor has its own, which grows with the updates.
        weight_decay: on matrices only, times the learning rate; norms, biases and other vectors are
            left alone.
        clip_norm: largest global gradient norm.
    """
    if kind not in OPTIMIZERS:
        raise Refused(f"optimizer={kind!r}; it may be {', '.join(map(repr, OPTIMIZERS))}")
    if kind == "adafactor":
        # The schedule gives the size of an update, not the size of the weights.
        direction = _over_matrices(
            optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        )
    elif kind == "muon":
        direction = optax.contrib.muon(
            -1.0,  # uphill, as all directions here; the schedule turns them round
            adam_b1=0.9,
            adam_b2=b2,
            muon_weight_dimension_numbers=_dimension_numbers,
            consistent_rms=_ADAM_RMS,
        )
    else:
        direction = optax.scale_by_adam(b1=0.9, b2=b2)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        direction,
        optax.add_decayed_weights(weight_decay, _is_matrix),
        optax.scale_by_learning_rate(schedule),
    )


def _is_matrix(model):
    """True for linear maps and embeddings, as declared; of arrays without a declaration, for those
    with two axes and more."""

    def decide(param):
        if not is_param(param):
            return param.ndim >= 2
        matrix = param.get_metadata("inputs") > 0 or "vocab" in param.get_metadata("axes")
        return jax.tree.map(lambda _: matrix, param)

    return jax.tree.map(decide, model, is_leaf=is_param)


def _over_matrices(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The same with each linear map as matrices [layers, inputs, outputs]. Adafactor factors the
    two largest axes of an array where both are large, and the width of a head seldom is."""

    def flat(model):
        def reshape(param):
            inputs = param.get_metadata("inputs") if is_param(param) else 0
            if not inputs:
                return param
            layers = param.shape[: is_stacked(param)]
            rows = math.prod(param.shape[len(layers) :][:inputs])
            return jax.tree.map(lambda x: x.reshape(*layers, rows, -1), param)

        return jax.tree.map(reshape, model, is_leaf=is_param)

    def update(gradients, state, model):
        updates, state = transformation.update(flat(gradients), state, flat(model))
        return jax.tree.map(lambda u, g: u.reshape(g.shape), updates, gradients), state

    return optax.GradientTransformation(lambda model: transformation.init(flat(model)), update)


def _dimension_numbers(model):
    """Which axes of each weight are inputs and outputs, as it was declared; None for what is no
    matrix of a layer: embeddings and heads, norms, biases."""

    def decide(param):
        # Optax takes the values out of the weights that are not Muon's.
        has_value = is_param(param) and jax.tree.leaves(param)
        inputs = param.get_metadata("inputs") if has_value else 0
        if not inputs or not is_stacked(param):
            return jax.tree.map(lambda _: None, param)
        axes = range(1, len(param.shape))
        numbers = optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])
        return jax.tree.map(lambda _: numbers, param)

    return jax.tree.map(decide, model, is_leaf=is_param)
