"""From tokens of packed rows to one number a segment.

Rows are packed as `jaxconv.data.packing` does it: `segment_ids` are 1, 2, … along a row and 0 is
padding. Column s − 1 of a result [R, S] belongs to segment s. S is fixed beforehand; the width of
the rows is always enough, since a segment has at least one token.

A preference pair lies in one row as two neighbours, chosen 2k + 1 and rejected 2k + 2, so that a
micro-batch never parts them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxconv.objectives import masked


class PairLogprobs(NamedTuple):
    """What a preference loss reads of packed pairs, each [R, P]."""

    chosen: jax.Array  # summed log-prob, nats; float32, or float64 if the log-probs are
    rejected: jax.Array
    chosen_tokens: jax.Array  # float32, how many were summed
    rejected_tokens: jax.Array
    present: jax.Array  # bool: both sides are there and count at least one token


def segment_sums(
    x: jax.Array, mask: jax.Array, segment_ids: jax.Array, *, num_segments: int | None = None
) -> jax.Array:
    """Sum of the selected entries of each segment.

    Args:
        x: [R, W] any number type.
        mask: [R, W] bool or 0/1; no other entry of `x` is read.
        segment_ids: [R, W] integer, 1, 2, … and 0 for padding.
        num_segments: S; None stands for W.

    Returns:
        [R, S] float32, or float64 if `x` is. 0 where a segment is absent or selects nothing. A row
        that holds a segment beyond S is NaN throughout.

    Raises:
        ValueError: shapes that do not fit.
    """
    ids_RW = jnp.asarray(segment_ids)
    _check_rows("mask", mask, ids_RW)
    _check_rows("x", x, ids_RW)
    S = ids_RW.shape[1] if num_segments is None else num_segments
    selected_RW = masked.select(x, (jnp.asarray(mask) != 0) & (ids_RW > 0))

    # A scatter-add: differences of a running sum would lose the digits of short segments, and a
    # one-hot product costs W times as much.
    def sums(x_W, ids_W):
        return jax.ops.segment_sum(x_W, ids_W, S + 1)[1:]

    sums_RS = jax.vmap(sums)(selected_RW, ids_RW)
    beyond_R1 = jnp.max(ids_RW, axis=1, keepdims=True, initial=0) > S
    return jnp.where(beyond_R1, jnp.nan, sums_RS)


def last_token(
    values: jax.Array, segment_ids: jax.Array, *, num_segments: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The value at the last token of each segment: what a reward model says of a conversation.

    Args:
        values: [R, W] float.
        segment_ids: [R, W] integer; the tokens of a segment are neighbours.
        num_segments: S; None stands for W.

    Returns:
        (values [R, S], present bool [R, S]); values as in `segment_sums`, 0 where absent.

    Raises:
        ValueError: shapes that do not fit.
    """
    ids_RW = jnp.asarray(segment_ids)
    _check_rows("values", values, ids_RW)
    next_RW = jnp.pad(ids_RW, ((0, 0), (0, 1)))[:, 1:]
    last_RW = (ids_RW > 0) & (ids_RW != next_RW)
    values_RS = segment_sums(values, last_RW, ids_RW, num_segments=num_segments)
    ends_RS = segment_sums(last_RW, last_RW, ids_RW, num_segments=num_segments)
    return values_RS, jnp.logical_not(ends_RS < 1)  # a row of NaN stays present, and is seen


def split_pairs(x_RS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(chosen, rejected), each [R, P], of one entry a segment [R, 2P]."""
    return x_RS[:, 0::2], x_RS[:, 1::2]


def pair_logprobs(
    logprob: jax.Array, mask: jax.Array, segment_ids: jax.Array, *, num_pairs: int | None = None
) -> PairLogprobs:
    """Summed log-probs of both sides of every pair of packed rows.

    Args:
        logprob: [R, W] log-prob of each target token, nats.
        mask: [R, W] bool or 0/1; the tokens of the answers.
        segment_ids: [R, W] integer; pair k has segments 2k + 1 (chosen) and 2k + 2 (rejected).
        num_pairs: P; None stands for W // 2.

    Raises:
        ValueError: shapes that do not fit.
    """
    P = jnp.shape(segment_ids)[1] // 2 if num_pairs is None else num_pairs
    sums_RS = segment_sums(logprob, mask, segment_ids, num_segments=2 * P)
    tokens_RS = segment_sums(jnp.ones_like(mask), mask, segment_ids, num_segments=2 * P)
    chosen_RP, rejected_RP = split_pairs(sums_RS)
    chosen_tokens_RP, rejected_tokens_RP = split_pairs(tokens_RS)
    absent_RP = (chosen_tokens_RP < 1) | (rejected_tokens_RP < 1)
    return PairLogprobs(
        chosen_RP, rejected_RP, chosen_tokens_RP, rejected_tokens_RP, jnp.logical_not(absent_RP)
    )


def _check_rows(name: str, x: jax.Array, ids_RW: jax.Array) -> None:
    if ids_RW.ndim != 2:
        raise ValueError(f"segment_ids has shape {ids_RW.shape}; it must be [R, W]")
    if jnp.shape(x) != ids_RW.shape:
        raise ValueError(f"{name} has shape {jnp.shape(x)}; segment_ids ask for {ids_RW.shape}")
