"""Supervised fine-tuning: the negative log-likelihood of the tokens that the mask selects."""

import jax
import jax.numpy as jnp

from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics


@jax.named_scope("sft_loss")
def sft_loss(logprob: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, Metrics]:
    """Sum of −log p over the selected tokens.

    Args:
        logprob: [..., T] log-prob of each target token, nats.
        mask: [..., T] bool or 0/1; the tokens to learn.

    Returns:
        (sum, denominator, metrics): float32 scalars; denominator counts the selected tokens. Divide
        by the denominator of the whole batch, not of a micro-batch.
    """
    nll = -masked.masked_sum(logprob, mask)
    return nll, masked.count(mask), Metrics({"nll": jax.lax.stop_gradient(nll)})


def finish_metrics(metrics: Metrics, denominator: jax.Array) -> dict[str, jax.Array]:
    """`nll` (nats a token) and `perplexity` from merged metrics and the merged denominator."""
    means = metrics.means(denominator)
    return means | {"perplexity": jnp.exp(means["nll"])}
