"""Stage A for filtered rows: the few largest tokens of every bin, without a sort."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling.spec import BINS, LEVELS, NO_TOKEN


class Candidates(NamedTuple):
    """The largest tokens of each bin, [B, LEVELS, BINS] each, in descending order along levels.

    Attributes:
        logit: float32; -inf in a slot that nothing fills.
        token: int32, global id; NO_TOKEN in a slot that nothing fills.
    """

    logit: jax.Array
    token: jax.Array

    @property
    def worst(self) -> jax.Array:
        """float32 [B]: every token above this is a candidate."""
        return jnp.max(self.logit[:, -1], axis=-1)


def tournament(x_BV: jax.Array, first_id: jax.Array | int = 0) -> Candidates:
    """Candidates of float32 rows [B, V], V a multiple of BINS, whose first token is `first_id`."""
    x_BSN = x_BV.reshape(x_BV.shape[0], -1, BINS)
    slab_S = jnp.arange(x_BSN.shape[1], dtype=jnp.int32)
    logit, slab = _levels(x_BSN, slab_S[None, :, None])
    bin_N = jnp.arange(BINS, dtype=jnp.int32)
    return _with_gaps(logit, first_id + slab * BINS + bin_N)


def merge(parts: Sequence[Candidates]) -> Candidates:
    """Candidates of a vocabulary whose pieces have these."""
    logit = jnp.concatenate([part.logit for part in parts], axis=1)
    token = jnp.concatenate([part.token for part in parts], axis=1)
    return _with_gaps(*_levels(logit, token))


def no_candidates(rows: int) -> Candidates:
    """Slots that nothing fills, for batches without a filtered row."""
    shape = (rows, LEVELS, BINS)
    return Candidates(jnp.full(shape, -jnp.inf), jnp.full(shape, NO_TOKEN, jnp.int32))


def _levels(x_BSN: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The LEVELS largest of [B, S, N] along S and their orders, lower order first among equals.

    Each level takes one pass for the value and one for its order, both plain reductions.
    """
    levels = []
    for _ in range(LEVELS):
        if not levels:
            value = jnp.max(x_BSN, axis=1)
            at_value = x_BSN == value[:, None]
        else:
            last, last_order = levels[-1]
            is_last = x_BSN == last[:, None]
            after = (x_BSN < last[:, None]) | (is_last & (order > last_order[:, None]))
            value = jnp.max(jnp.where(after, x_BSN, -jnp.inf), axis=1)
            # Only a value equal to the last one may have been taken before.
            taken = jnp.where(last == value, last_order, -1)
            at_value = (x_BSN == value[:, None]) & (order > taken[:, None])
        levels.append((value, jnp.min(jnp.where(at_value, order, NO_TOKEN), axis=1)))
    return tuple(jnp.stack(parts, axis=1) for parts in zip(*levels, strict=True))


def _with_gaps(logit: jax.Array, token: jax.Array) -> Candidates:
    return Candidates(logit, jnp.where(jnp.isneginf(logit), NO_TOKEN, token))
