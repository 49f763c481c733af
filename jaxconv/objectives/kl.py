"""Estimators of KL(policy ‖ reference) from tokens sampled by the policy.

With r = p_ref / p_policy at a sampled token (Schulman, "Approximating KL divergence", 2020):

    k1 = −log r              unbiased; belongs in a reward
    k3 = (r − 1) − log r     unbiased, never negative, small variance; belongs in a loss

Both estimate the same number; their gradients differ. As a reward, k1 gives the gradient of
KL(policy ‖ reference). Differentiated as a loss, k1 has expected gradient zero and pulls nowhere,
and k3 has that of KL(reference ‖ policy), as in GRPO: it keeps the policy's mass wherever the
reference has some, and hardly minds how sharp it gets.
"""

import jax
import jax.numpy as jnp

from jaxconv.objectives import masked

# exp(20) is far past anything a ratio should be; the clip keeps a broken log-prob from becoming an
# infinity.
LOG_RATIO_LIMIT = 20.0


def k1(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
    """log p − log p_ref per token, nats, float32."""
    return jnp.asarray(logprob, jnp.float32) - jnp.asarray(ref_logprob, jnp.float32)


def k3(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
    """exp(log p_ref − log p) − 1 − (log p_ref − log p) per token, nats, float32, at least 0.

    The log-ratio is clipped to ±20 inside the exponential alone.
    """
    log_ratio = -k1(logprob, ref_logprob)
    clipped = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return jnp.expm1(clipped) - log_ratio


def kl_token_rewards(
    logprob: jax.Array, ref_logprob: jax.Array, mask: jax.Array, *, coefficient: float
) -> jax.Array:
    """−coefficient · k1 at the selected tokens, 0 elsewhere: a KL penalty as token rewards.

    All arrays [..., T]; `logprob` is that of the policy that sampled. No gradient flows.
    """
    penalty = k1(masked.select(logprob, mask), masked.select(ref_logprob, mask))
    return jax.lax.stop_gradient(-coefficient * penalty)
