"""The numerical specification that every form of the sampler follows.

Two forms that follow it on the same platform draw the same tokens. Across platforms `exp` and `log`
differ in the last bit, so that near-ties of a perturbed logit may fall the other way.

A row, in float32 whatever the logits' dtype:

1. x is the logit, -inf where it is NaN or not allowed by the mask; m is the largest x.
2. A row of no allowed token (m = -inf) gives token 0. A greedy row (temperature 0) and a row with
   an allowed +inf give the lowest index of m, with probability 1.
3. z = (x - m) * scale with scale = 1 / temperature. The tokens lie in *cells*. A cell has the pair
   (largest x, sum of exp((x - largest) * scale)); its mass is the sum times
   exp((largest - m) * scale), and Z, the mass of the row, is the sum of these in the order of
   `cell_total`.
4. Filters keep x >= tau, tau = max(tau_k, tau_p, tau_m), so all tokens that tie with tau stay:
   tau_k is the k-th largest x. tau_p is the least x with mass{above x} < top_p * M, where M is the
   mass of {x >= tau_k} with top-k on and Z with it off. tau_m = m + (temperature * log(min_p)).
   tau never exceeds m.
5. A filtered row draws the kept token with the first largest z + Gumbel(domain 0, token).
   An unfiltered row draws the cell with the first largest mass / Exponential(domain 1, cell), and
   in it the token with the first largest exp((x - m') * scale) / Exponential(domain 2, token), m'
   the largest of the cell's pair. -log of an exponential is a Gumbel, and the largest of a cell's
   Gumbels is one at the cell's log-mass: the same draw, with a few hundred or thousand random
   numbers in place of V, and without their second logarithm.

**Cells.** Above `SMALL_VOCAB` a cell is 2048 consecutive tokens: at most 128 cells, one vector of
lanes, up to V = 262,144. In a small vocabulary cell c is every 32nd token from c on, and the
`largest` of every pair is m. The noise of V = 512 is then 32 + 16 draws rather than 2048; a model
small enough to have such a vocabulary costs less than that noise would. And a cell is then summed
over rows of 32 lanes, which needs no step across lanes.

**Candidates.** Above `SMALL_VOCAB` token t falls in bin t mod 1024, and the candidates of a row are
the 4 largest of each bin, lower index first among equals. Let `worst` be the largest of the bins'
last. All tokens above `worst` are candidates, so a row is *certified*, and finished from its
candidates alone, when worst < tau (with both top-k and top-p on: worst < tau_k, for M needs the
whole top-k set), or when worst = -inf. Other rows take several exact passes over all logits, which
give the same threshold and token unless mass{above x} is within rounding of top_p * M. A small
vocabulary is its own candidate list.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
CELL = 2048
SMALL_LANES = 32  # cells of a small vocabulary
BINS = 1024
LEVELS = 4
SMALL_VOCAB = BINS * LEVELS
_XLA_BY_FOURS = 4096  # numbers in an array
NO_TOKEN = 0x7FFFFFFF  # in a candidate slot that nothing fills

EMPTY = 1  # no token is allowed: token 0, both log-probs -inf
GREEDY = 2  # temperature 0
INFINITE = 4  # an allowed logit is +inf
FILTERED = 8  # top-k, top-p or min-p is on, in a row that none of the flags above decides
FALLBACK = 16  # the row took the exact passes over all logits


class Sampled(NamedTuple):
    """One draw a row.

    Attributes:
        token: int32 [B].
        logprob_raw: float32 [B], in nats, of the token under softmax(logits): no mask, temperature
            or filter. With +inf logits: 0 if the token's own is +inf, else -inf.
        logprob_processed: float32 [B], in nats, of the token under the distribution that it was
            drawn from, mask, temperature and filters applied; 0 for a greedy row.
        threshold: float32 [B], tau on the scale of the logits as given (no temperature applied): an
            allowed token was kept if its logit is at least tau. -inf if nothing was filtered; the
            largest allowed logit in greedy rows, rows with +inf and empty rows.
        kept_mass: float32 [B], share of the kept tokens in the masked and tempered distribution:
            above 0 and, to rounding, at most 1; 1 if nothing was filtered and in greedy rows; 0 in
            empty rows.
        flags: int32 [B], a sum of EMPTY, GREEDY, INFINITE, FILTERED and FALLBACK.
    """

    token: jax.Array
    logprob_raw: jax.Array
    logprob_processed: jax.Array
    threshold: jax.Array
    kept_mass: jax.Array
    flags: jax.Array


class RowParameters(NamedTuple):
    """What the arguments of a row come to, [B] each.

    Attributes:
        scale: float32, 1 / temperature; 1 in greedy rows.
        greedy: bool.
        top_k: int32; 0 is off.
        top_p: float32; at least 1 is off.
        min_p_margin: float32, temperature * log(min_p), at most 0; -inf is off.
    """

    scale: jax.Array
    greedy: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p_margin: jax.Array

    @property
    def filtered(self) -> jax.Array:
        """bool [B], whether any filter is on."""
        on = (self.top_k > 0) | (self.top_p < 1) | (self.min_p_margin > -jnp.inf)
        return on & ~self.greedy


def row_parameters(rows, vocab, temperature, top_k, top_p, min_p) -> RowParameters:
    """Brings scalars or [B] arrays to `RowParameters` of [B] arrays.

    Raises:
        ValueError: one has another shape.
    """

    def per_row(name, value, dtype):
        value = jnp.asarray(value, dtype)
        if value.shape not in ((), (rows,)):
            raise ValueError(f"{name} has shape {value.shape}; it must be a number or [{rows}]")
        return jnp.broadcast_to(value, (rows,))

    temperature = per_row("temperature", temperature, jnp.float32)
    greedy = ~(temperature > 0)
    # The scale stays finite and above 0: 0 * scale, of the likeliest token, is 0, and -inf * scale,
    # of one that is not allowed, is -inf.
    temperature = jnp.where(greedy, 1.0, jnp.clip(temperature, 1e-12, 1e30))
    top_k = per_row("top_k", top_k, jnp.int32)
    min_p = per_row("min_p", min_p, jnp.float32)
    # The barrier keeps the product's own rounding, which a fused multiply-add would skip.
    margin = jax.lax.optimization_barrier(temperature * jnp.log(jnp.minimum(min_p, 1.0)))
    return RowParameters(
        scale=1.0 / temperature,
        greedy=greedy,
        top_k=jnp.where((top_k > 0) & (top_k < vocab), top_k, 0),
        top_p=per_row("top_p", top_p, jnp.float32),
        min_p_margin=jnp.where(min_p > 0, margin, -jnp.inf),
    )


def is_small(vocab: int) -> bool:
    """Whether a row is its own candidate list, with cells of every 32nd token."""
    return vocab <= SMALL_VOCAB


def clean(logits: jax.Array) -> jax.Array:
    """float32 logits with NaN as -inf."""
    x = logits.astype(jnp.float32)
    return jnp.where(jnp.isnan(x), -jnp.inf, x)


def ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 x, which is not NaN; -0 is 0, with which it ties."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return jnp.where(key != -1, key, 0)


def from_ordered(key: jax.Array) -> jax.Array:
    """The float32 that `ordered` brings to this."""
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def lane_sum(x: jax.Array, *, computed: bool = False) -> jax.Array:
    """Sums [..., N, lanes] to [...]: the N rows by `row_sum`, then the lanes by halves.

    lanes is a power of two. On a CPU halving is several times as fast as a sum along lanes.
    """
    x = row_sum(x, computed=computed)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def row_sum(x: jax.Array, *, computed: bool = False) -> jax.Array:
    """Sums [..., N, lanes] to [..., lanes]: rows by fours, those by fours, what is left in order.

    The order is spelled out because Z must depend neither on how a compiler splits a sum nor on how
    large the batch is.

    Args:
        x: the numbers.
        computed: they take work to compute, as exponentials do.
    """
    # In arrays that are not tiny XLA takes this very order on a CPU, where its own reduction is the
    # slower way, except for numbers that it computes meanwhile, and for short rows.
    if x.size >= _XLA_BY_FOURS and (computed or x.shape[-1] < LANES):
        return jax.lax.platform_dependent(
            x, cpu=functools.partial(jnp.sum, axis=-2), default=_rows_by_fours
        )
    return _rows_by_fours(x)


def _rows_by_fours(x: jax.Array) -> jax.Array:
    for _ in range(2):
        if x.shape[-2] > 1:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % 4), (0, 0)])
            x = x[..., 0::4, :] + x[..., 1::4, :] + x[..., 2::4, :] + x[..., 3::4, :]
    return functools.reduce(jnp.add, [x[..., row, :] for row in range(x.shape[-2])])


def sum_of_rows(rows: Sequence[jax.Array]) -> jax.Array:
    """`row_sum` where a kernel holds the rows one by one."""
    for _ in range(2):
        rows = [functools.reduce(jnp.add, rows[i : i + 4]) for i in range(0, len(rows), 4)]
    return functools.reduce(jnp.add, rows)


def cell_total(sums_BC: jax.Array) -> jax.Array:
    """Sums one number a cell, [B, C], to [B]: cells are lanes, in vectors of 32 or 128."""
    cells = sums_BC.shape[-1]
    lanes = SMALL_LANES if cells <= SMALL_LANES else LANES
    padded = jnp.pad(sums_BC, ((0, 0), (0, -cells % lanes)))
    return lane_sum(padded.reshape(padded.shape[0], -1, lanes))


def expand(per_row: jax.Array, like: jax.Array) -> jax.Array:
    """[B] as [B, 1, ...] of the rank of `like`."""
    return per_row.reshape(per_row.shape[0], *(1,) * (like.ndim - 1))
