"""Clipped PPO with a critic (Schulman et al. 2017) over the action tokens of conversations.

Per action token, with ρ = exp(log p − log p_old), advantage A and importance weight w:

    policy   −w · min(ρ A, clip(ρ, 1 − low, 1 + high) A)     low ≠ high: "clip-higher" (DAPO, 2025)
             and, with a dual clip c, at most −w c A where A < 0 (Ye et al. 2020)
    critic   ½ max((v − G)², (v_old + clip(v − v_old, ±δ) − G)²)
    entropy  −H
    KL       k3(p ‖ p_ref)                                    `jaxconv.objectives.kl`

The loss is the weighted SUM over tokens. Its denominator, the number of action tokens, is returned
beside it: the caller adds both over micro-batches and devices and divides once, so that a token
weighs the same wherever it was put.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxconv.objectives import kl, masked
from jaxconv.objectives.metrics import Metrics


@dataclass(frozen=True)
class PPOCoefficients:
    """The weights and clips of the loss; dimensionless unless said otherwise."""

    clip_low: float = 0.2  # ρ is held above 1 − clip_low where A < 0
    clip_high: float = 0.28  # ρ is held below 1 + clip_high where A > 0
    value_clip: float = 0.2  # δ, in units of the value; 0 leaves the critic unclipped
    value_coef: float = 0.5
    entropy_coef: float = 0.0  # per nat
    kl_coef: float = 0.0  # per nat, k3 in the loss; a penalty in the reward is `kl_token_rewards`
    dual_clip: float = 0.0  # c > 1, bounds the loss of unlikely bad tokens; 0: off

    def __post_init__(self):
        if not 0.0 < self.clip_low < 1.0:
            raise ValueError(f"clip_low is {self.clip_low}; it must lie between 0 and 1")
        if not self.clip_high > 0.0:
            raise ValueError(f"clip_high is {self.clip_high}; it must be above 0")
        if self.dual_clip != 0.0 and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be above 1, or 0 for none")
        for name in ("value_clip", "value_coef", "entropy_coef", "kl_coef"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PPOBatch:
    """What the loss reads of a rollout, all [..., T], constants to the gradient; a pytree.

    old_logprob: log-prob of the sampled token before this update began, nats.
    ref_logprob: log-prob under the frozen reference, nats; None where no KL is wanted.
    advantage: whitened or not, zero off the mask.
    value_target: what the critic should say, before whitening.
    old_value: what the critic said before this update began.
    is_weight: truncated importance weight of trainer against sampler; 1 where they agree.
    mask: bool or 0/1; action tokens that count. No other entry of any array is read.
    """

    old_logprob: jax.Array
    ref_logprob: jax.Array | None
    advantage: jax.Array
    value_target: jax.Array
    old_value: jax.Array
    is_weight: jax.Array
    mask: jax.Array


@jax.named_scope("ppo_loss")
def ppo_loss(
    logprob: jax.Array,
    entropy: jax.Array,
    value: jax.Array,
    batch: PPOBatch,
    *,
    coefficients: PPOCoefficients,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The PPO loss of a (micro-)batch, summed over its action tokens.

    Args:
        logprob: [..., T] log-prob of the sampled tokens under the policy being trained, nats.
        entropy: [..., T] entropy of its distribution at each token, nats.
        value: [..., T] the critic before each token.
        batch: the rollout, same leading shape.
        coefficients: weights and clips.

    Returns:
        (sum, denominator, metrics): float32 scalars and unfinished metrics (`finish_metrics`).
        Only `sum` carries gradient, and only into `logprob`, `entropy` and `value`.

    Raises:
        ValueError: `kl_coef` above 0 without `ref_logprob`.
    """
    c = coefficients
    if c.kl_coef > 0.0 and batch.ref_logprob is None:
        raise ValueError(f"kl_coef is {c.kl_coef} but the batch has no ref_logprob")
    mask = batch.mask
    logprob, entropy, value = (masked.select(x, mask) for x in (logprob, entropy, value))
    old_logprob, advantage, target, old_value, weight = (
        stop_gradient(masked.select(x, mask))
        for x in (
            batch.old_logprob,
            batch.advantage,
            batch.value_target,
            batch.old_value,
            batch.is_weight,
        )
    )

    ratio = jnp.exp(jnp.clip(logprob - old_logprob, -kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT))
    clipped_ratio = jnp.clip(ratio, 1.0 - c.clip_low, 1.0 + c.clip_high)
    policy = jnp.maximum(-ratio * advantage, -clipped_ratio * advantage)
    if c.dual_clip > 0.0:
        policy = jnp.where(advantage < 0, jnp.minimum(policy, -c.dual_clip * advantage), policy)
    policy = weight * policy

    critic = 0.5 * jnp.square(value - target)
    clipped_critic = critic
    if c.value_clip > 0.0:
        near = old_value + jnp.clip(value - old_value, -c.value_clip, c.value_clip)
        clipped_critic = 0.5 * jnp.square(near - target)
    critic_loss = jnp.maximum(critic, clipped_critic)

    loss = policy + c.value_coef * critic_loss - c.entropy_coef * entropy
    sums = {
        "policy/loss": policy,
        "policy/ratio_mean": ratio,
        "policy/clip_fraction_low": (ratio < 1.0 - c.clip_low) & (advantage < 0),
        "policy/clip_fraction_high": (ratio > 1.0 + c.clip_high) & (advantage > 0),
        "policy/kl_old": kl.k3(old_logprob, logprob),
        "policy/entropy": entropy,
        "critic/loss": critic_loss,
        "critic/clip_fraction": clipped_critic > critic,
        "critic/value_mean": value,
        "critic/target_mean": target,
        "critic/target_square": jnp.square(target),
        "critic/residual": target - old_value,
        "critic/residual_square": jnp.square(target - old_value),
    }
    if batch.ref_logprob is not None:
        ref_kl = kl.k3(logprob, stop_gradient(masked.select(batch.ref_logprob, mask)))
        loss = loss + c.kl_coef * ref_kl
        sums["policy/kl_ref"] = ref_kl
    sums["loss"] = loss
    metrics = Metrics(
        {name: stop_gradient(masked.masked_sum(x, mask)) for name, x in sums.items()},
        {"policy/ratio_max": stop_gradient(masked.masked_max(ratio, mask))},
    )
    return masked.masked_sum(loss, mask), masked.count(mask), metrics


def finish_metrics(metrics: Metrics, denominator: jax.Array) -> dict[str, jax.Array]:
    """Scalars to log, from merged metrics and the merged denominator.

    All are means per action token, except `policy/ratio_max`; `critic/target_std` and
    `critic/explained_variance` = 1 − Var(target − old value) / Var(target), which says how well the
    critic knew the targets before the update (1 perfect, 0 no better than a constant; NaN where the
    targets do not vary). KL and entropy in nats.
    """
    means = metrics.means(denominator)
    target_square = means.pop("critic/target_square")
    residual, residual_square = means.pop("critic/residual"), means.pop("critic/residual_square")
    target_variance = jnp.maximum(target_square - jnp.square(means["critic/target_mean"]), 0.0)
    residual_variance = jnp.maximum(residual_square - jnp.square(residual), 0.0)
    varies = target_variance > 0.0
    explained = 1.0 - residual_variance / jnp.where(varies, target_variance, 1.0)
    return means | {
        "critic/target_std": jnp.sqrt(target_variance),
        "critic/explained_variance": jnp.where(varies, explained, jnp.nan),
    }
