"""Optimizers from a config section."""

import jax
import optax

from jaxconv.errors import Refused

SCHEDULES = ("constant", "cosine")


def make_schedule(learning_rate: float, *, kind: str, steps: int, warmup: int) -> optax.Schedule:
    """Learning rate by update.

    Args:
        learning_rate: peak.
        kind: "constant" or "cosine" (to a tenth of the peak), both after a linear warm-up.
        steps: updates in all.
        warmup: updates until the peak.
    """
    if kind not in SCHEDULES:
        raise Refused(f"schedule={kind!r}; it may be {' or '.join(map(repr, SCHEDULES))}")
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, warmup, max(steps, warmup + 1), end_value=learning_rate / 10
        )
    return optax.linear_schedule(0.0 if warmup else learning_rate, learning_rate, warmup)


def make_optimizer(
    schedule: optax.Schedule, *, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    Args:
        schedule: learning rate by update.
        b2: decay of the second moment.
        weight_decay: on matrices only; norms, biases and other vectors are left alone.
        clip_norm: largest global gradient norm.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mask=_is_matrix),
    )


def _is_matrix(model):
    """Stacked layers add an axis, so a stacked norm has two and a stacked matrix three."""

    def decide(path, leaf):
        stacked = any(getattr(key, "name", None) == "layers" for key in path)
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decide, model)
