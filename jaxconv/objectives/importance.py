"""Truncated importance weights: the trainer corrects for a sampler that is not quite itself.

The sampler decodes token by token in its own layout and precision, and its parameters may be some
updates old, so its recorded log-probs differ from the trainer's. The weight
w_i = min(exp(clip(log p_train − log p_sampler, ±20)), cap) multiplies the policy term of a token.
"""

import jax
import jax.numpy as jnp

from jaxconv.objectives import masked
from jaxconv.objectives.kl import LOG_RATIO_LIMIT, k3


def truncated_importance_weights(
    logprob_train: jax.Array, logprob_behaviour: jax.Array, mask: jax.Array, *, cap: float = 2.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Per-token weights without gradient, and how far sampler and trainer drifted apart.

    Args:
        logprob_train: [..., T] log-probs of the sampled tokens under the trainer, nats.
        logprob_behaviour: [..., T] log-probs recorded when they were sampled, nats.
        mask: [..., T] bool or 0/1; action tokens.
        cap: largest weight, at least 1.

    Returns:
        (weights, metrics). weights: [..., T] float32, 1 off the mask. metrics, float32 scalars:
        `weight_mean`; `clipped_fraction` of the tokens; `ess`, the effective sample size as a
        fraction of the tokens, (Σw)² / (n Σw²); `abs_logp_mean` and `abs_logp_max`, nats; `kl`,
        the k3 estimate of KL(behaviour ‖ train), nats.

    Raises:
        ValueError: a cap below 1.
    """
    if cap < 1.0:
        raise ValueError(f"cap is {cap}; it must be at least 1")
    train = jax.lax.stop_gradient(masked.select(logprob_train, mask))
    behaviour = jax.lax.stop_gradient(masked.select(logprob_behaviour, mask))
    difference = train - behaviour
    ratio = jnp.exp(jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    weights = jnp.minimum(ratio, cap)
    tokens = masked.count(mask)
    total = masked.masked_sum(weights, mask)
    squares = masked.masked_sum(jnp.square(weights), mask)
    metrics = {
        "weight_mean": masked.masked_mean(weights, mask),
        "clipped_fraction": masked.masked_mean(ratio > cap, mask),
        "ess": jnp.square(total) / jnp.maximum(squares * tokens, jnp.finfo(jnp.float32).tiny),
        "abs_logp_mean": masked.masked_mean(jnp.abs(difference), mask),
        "abs_logp_max": jnp.max(jnp.abs(difference)),
        "kl": masked.masked_mean(k3(behaviour, train), mask),
    }
    return weights, metrics
