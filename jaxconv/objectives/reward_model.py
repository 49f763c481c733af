"""Bradley-Terry reward models: the chosen answer wins with probability σ(r_w − r_l).

The loss of a pair is −log σ(r_w − r_l − m) with a margin m that says how clear the preference was
(Touvron et al. 2023, arXiv 2307.09288, eq. 2; Ouyang et al. 2022, arXiv 2203.02155, eq. 1 with
m = 0). Differences leave the level of rewards open; c (r_w + r_l)² ties it to zero (Eisenstein et
al. 2023, arXiv 2312.09244, eq. 2).
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxconv.objectives import masked
from jaxconv.objectives.metrics import Metrics, Spread


@jax.named_scope("bradley_terry_loss")
def bradley_terry_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    margin: jax.Array | None = None,
    center_coefficient: float = 0.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The loss of a (micro-)batch, summed over its pairs.

    Args:
        chosen, rejected: [B] rewards of both answers.
        margin: [B] by how much the chosen reward should be ahead at least; None stands for 0.
        center_coefficient: c, at least 0.
        mask: [B] bool or 0/1; the pairs that are there. No other entry of any array is read.

    Returns:
        (sum, denominator, metrics): scalars, float32 or float64 as `chosen` is, and unfinished
        metrics (`finish_metrics`). The denominator counts pairs. Only `sum` carries gradient, and
        only into the rewards.

    Raises:
        ValueError: shapes that do not fit, or a negative coefficient.
    """
    if not center_coefficient >= 0.0:
        raise ValueError(f"center_coefficient is {center_coefficient}; it must be at least 0")
    shape = jnp.shape(chosen)
    for name, x in (("rejected", rejected), ("margin", margin), ("mask", mask)):
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; chosen asks for {shape}")
    mask = jnp.ones(shape, bool) if mask is None else mask
    reward_w, reward_l = masked.select(chosen, mask), masked.select(rejected, mask)
    ahead = reward_w - reward_l
    required = 0.0 if margin is None else stop_gradient(masked.select(margin, mask))
    losses = -jax.nn.log_sigmoid(ahead - required)
    losses = losses + center_coefficient * jnp.square(reward_w + reward_l)

    total = masked.masked_sum(losses, mask)
    sums = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margin": ahead,
        "rewards/accuracy": 0.5 * (1.0 + jnp.sign(ahead)),
    }
    maxima = {
        "rewards/max": jnp.maximum(reward_w, reward_l),
        "rewards/min": -jnp.minimum(reward_w, reward_l),
    }
    metrics = Metrics(
        {name: masked.masked_sum(x, mask) for name, x in sums.items()} | {"loss": total},
        {name: masked.masked_max(x, mask) for name, x in maxima.items()},
        {"rewards/std": Spread.of(reward_w, mask).merge(Spread.of(reward_l, mask))},
    )
    return total, masked.count(mask).astype(total.dtype), stop_gradient(metrics)


def finish_metrics(metrics: Metrics, denominator: jax.Array) -> dict[str, jax.Array]:
    """Scalars to log, from merged metrics and the merged denominator.

    Means over the pairs, accuracy counting a tie half; `rewards/max`, `rewards/min` and
    `rewards/std`, the population standard deviation, are over all answers.
    """
    means = metrics.means(denominator)
    return means | {"rewards/min": -means["rewards/min"]}
