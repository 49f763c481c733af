"""Whitening of advantages within each team.

Teams of one game differ in size and in base rate (two wolves against five villagers, a seller who
speaks first). Whitening over all of them pushes the weaker side's every token down, so moments are
taken per team.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxconv.objectives import masked

MODES = ("whiten", "center", "none")


class TeamMoments(NamedTuple):
    """Moments of the advantages of each team over its action tokens, each [G] float32."""

    mean: jax.Array
    std: jax.Array  # population
    tokens: jax.Array  # action tokens
    streams: jax.Array  # rows with at least one action token


def team_moments(
    advantages: jax.Array, mask: jax.Array, group_ids: jax.Array, num_groups: int
) -> TeamMoments:
    """Token-weighted moments of `advantages` [B, T] per group id [B]; 0 for empty groups."""

    def per_team(x_B):
        return jax.ops.segment_sum(x_B, group_ids, num_groups)

    tokens_B = masked.count(mask, axis=1)
    tokens_G = per_team(tokens_B)
    divisor_G = jnp.maximum(tokens_G, 1.0)
    mean_G = per_team(masked.masked_sum(advantages, mask, axis=1)) / divisor_G
    centred_BT = jnp.asarray(advantages, jnp.float32) - _of_stream(mean_G, group_ids)
    variance_G = per_team(masked.masked_sum(jnp.square(centred_BT), mask, axis=1)) / divisor_G
    streams_G = per_team((tokens_B > 0).astype(jnp.float32))
    return TeamMoments(mean_G, jnp.sqrt(variance_G), tokens_G, streams_G)


def whiten(
    advantages: jax.Array,
    mask: jax.Array,
    group_ids: jax.Array | None = None,
    *,
    num_groups: int = 1,
    mode: str = "whiten",
    min_streams: int = 2,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Advantages centred and scaled within each team.

    A team with fewer than `min_streams` streams has no mean of its own: subtracting the mean of one
    stream from itself erases how the episode went. Such a team is not centred; under "whiten" it is
    only divided by the spread of the whole batch, so that its scale fits the others'.

    Args:
        advantages: [B, T] float.
        mask: [B, T] bool or 0/1; action tokens.
        group_ids: [B] integer in [0, num_groups); the team of each stream. None: all one team.
        num_groups: how many teams there are.
        mode: "whiten" (mean 0, standard deviation 1 in each team), "center" (mean 0) or "none".
        min_streams: a team needs this many streams with action tokens to be centred.
        epsilon: added to each standard deviation.

    Returns:
        [B, T] float32, zero off the mask.

    Raises:
        ValueError: an unknown mode, or group ids without their number.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it may be 'whiten', 'center' or 'none'")
    if group_ids is None:
        if num_groups != 1:
            raise ValueError(f"num_groups is {num_groups} without group_ids; it must then be 1")
        group_ids = jnp.zeros(jnp.shape(advantages)[0], jnp.int32)
    if jnp.shape(group_ids) != jnp.shape(advantages)[:1]:
        raise ValueError(
            f"group_ids has shape {jnp.shape(group_ids)}; "
            f"advantages ask for {jnp.shape(advantages)[:1]}"
        )
    advantages_BT = jnp.asarray(advantages, jnp.float32)
    if mode == "none":
        return masked.select(advantages_BT, mask)
    moments = team_moments(advantages_BT, mask, group_ids, num_groups)
    enough_G = moments.streams >= min_streams
    shift_G = jnp.where(enough_G, moments.mean, 0.0)
    if mode == "whiten":
        scale_G = jnp.where(enough_G, moments.std, masked.masked_std(advantages_BT, mask)) + epsilon
    else:
        scale_G = jnp.ones_like(shift_G)
    whitened_BT = (advantages_BT - _of_stream(shift_G, group_ids)) / _of_stream(scale_G, group_ids)
    return masked.select(whitened_BT, mask)


def _of_stream(x_G: jax.Array, group_ids: jax.Array) -> jax.Array:
    """The entry of each stream's team, [B, 1]; NaN where the id names no team."""
    return x_G.at[group_ids].get(mode="fill", fill_value=jnp.nan)[:, None]
