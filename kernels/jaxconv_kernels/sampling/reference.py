"""The definition in plain jnp: sorts, full-vocabulary noise, one step after the other.

For tests and for reading. It builds nothing that another form of the sampler builds, except the
noise of the two-level draw; that of filtered rows is `jax.random.gumbel` itself.
"""

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling import noise, spec
from jaxconv_kernels.sampling.mask import unpack_mask
from jaxconv_kernels.sampling.spec import RowParameters, Sampled


def sample(
    logits: jax.Array, keys_B2: jax.Array, parameters: RowParameters, mask: jax.Array | None
) -> Sampled:
    """Samples rows [B, V]; FALLBACK is never set. Arguments as of `xla.sample`."""
    raw_BV = spec.clean(logits)
    x_BV = (
        raw_BV if mask is None else jnp.where(unpack_mask(mask, raw_BV.shape[1]), raw_BV, -jnp.inf)
    )
    return jax.vmap(_sample_row)(raw_BV, x_BV, keys_B2, parameters)


def _sample_row(raw_V, x_V, key_2, row: RowParameters) -> Sampled:
    vocab = len(x_V)
    largest = jnp.max(x_V)
    empty, infinite = jnp.isneginf(largest), jnp.isposinf(largest)
    certain = row.greedy | infinite | empty
    filtered = row.filtered & ~certain
    peak = jnp.where(jnp.isfinite(largest), largest, 0.0)
    z_V = (x_V - peak) * row.scale
    total = _mass(x_V, row.scale)

    threshold = jnp.where(
        filtered, jnp.minimum(_threshold(x_V, z_V, peak, total, row), peak), -jnp.inf
    )
    kept_V = (x_V >= threshold) & (x_V > -jnp.inf)
    kept_mass = jnp.where(filtered, jnp.sum(jnp.where(kept_V, jnp.exp(z_V), 0.0)), total)

    noise_V = jax.random.gumbel(jax.random.wrap_key_data(key_2, impl="threefry2x32"), (vocab,))
    chosen = jnp.argmax(jnp.where(kept_V, z_V + noise_V, -jnp.inf))
    token = jnp.where(filtered, chosen, _two_level(x_V, row.scale, key_2))
    token = jnp.where(certain, jnp.argmax(x_V), token).astype(jnp.int32)
    token = jnp.where(empty, 0, token)

    raw_largest = jnp.max(raw_V)
    raw_peak = jnp.where(jnp.isfinite(raw_largest), raw_largest, 0.0)
    raw = raw_V[token] - raw_peak - jnp.log(_mass(raw_V, jnp.float32(1.0)))
    raw = jnp.where(
        jnp.isposinf(raw_largest), jnp.where(jnp.isposinf(raw_V[token]), 0.0, -jnp.inf), raw
    )
    processed = jnp.where(certain, 0.0, z_V[token] - jnp.log(kept_mass))
    flags = (
        jnp.where(empty, spec.EMPTY, 0)
        + jnp.where(row.greedy, spec.GREEDY, 0)
        + jnp.where(infinite, spec.INFINITE, 0)
        + jnp.where(filtered, spec.FILTERED, 0)
    )
    return Sampled(
        token=token,
        logprob_raw=jnp.where(empty, -jnp.inf, raw),
        logprob_processed=jnp.where(empty, -jnp.inf, processed),
        threshold=jnp.where(certain, largest, threshold),
        kept_mass=jnp.where(
            filtered, jnp.minimum(kept_mass / total, 1.0), jnp.where(empty, 0.0, 1.0)
        ),
        flags=flags,
    )


def _threshold(x_V, z_V, peak, total, row: RowParameters) -> jax.Array:
    """tau of a filtered row, from the sorted row."""
    order = jnp.argsort(-x_V)
    x_V, mass_V = x_V[order], jnp.exp(z_V[order])
    kth = jnp.where(row.top_k > 0, x_V[jnp.maximum(row.top_k, 1) - 1], -jnp.inf)
    mass_V = jnp.where(x_V >= kth, mass_V, 0.0)
    total = jnp.where(row.top_k > 0, jnp.sum(mass_V), total)
    # The mass above a token is the sum before the first token that ties with it.
    before_V = jnp.cumsum(mass_V) - mass_V
    above_V = before_V[jnp.searchsorted(-x_V, -x_V)]
    stays_V = (above_V < row.top_p * total) & (x_V >= kth)
    nucleus = jnp.min(jnp.where(stays_V, x_V, peak))
    nucleus = jnp.where(row.top_p < 1, nucleus, -jnp.inf)
    return jnp.maximum(jnp.maximum(kth, nucleus), peak + row.min_p_margin)


def _cells(x_V) -> tuple[jax.Array, jax.Array]:
    """(logits, ids) [C, T] of the cells of a row, padded with -inf."""
    small = spec.is_small(len(x_V))
    size = spec.SMALL_LANES if small else spec.CELL
    x_V = jnp.pad(x_V, (0, -len(x_V) % size), constant_values=-jnp.inf)
    ids_V = jnp.arange(len(x_V), dtype=jnp.int32)
    x_CT, ids_CT = x_V.reshape(-1, size), ids_V.reshape(-1, size)
    return (x_CT.T, ids_CT.T) if small else (x_CT, ids_CT)


def _cell_masses(x_V, scale) -> tuple[jax.Array, jax.Array]:
    """(`largest` of the pairs, masses) of a row's cells, [C] each."""
    x_CT, _ = _cells(x_V)
    peak = _finite(jnp.max(x_CT))
    if spec.is_small(len(x_V)):
        return jnp.full(len(x_CT), peak), jnp.sum(jnp.exp((x_CT - peak) * scale), axis=-1)
    base_C = _finite(jnp.max(x_CT, axis=-1))
    mass_CT = jnp.exp((x_CT - base_C[:, None]) * scale)
    sum_C = spec.lane_sum(mass_CT.reshape(len(x_CT), -1, spec.LANES))
    largest_C = jnp.max(x_CT, axis=-1)
    return base_C, sum_C * jnp.exp((largest_C - peak) * scale)


def _mass(x_V, scale) -> jax.Array:
    return spec.cell_total(_cell_masses(x_V, scale)[1][None])[0]


def _two_level(x_V, scale, key_2) -> jax.Array:
    """The draw of an unfiltered row."""
    base_C, mass_C = _cell_masses(x_V, scale)
    x_CT, ids_CT = _cells(x_V)
    cell = jnp.argmax(mass_C / _exponential(key_2, noise.CELLS, jnp.arange(len(mass_C))))
    ids_T = ids_CT[cell]
    mass_T = jnp.exp((x_CT[cell] - base_C[cell]) * scale)
    return ids_T[jnp.argmax(mass_T / _exponential(key_2, noise.TOKENS_IN_CELL, ids_T))]


def _exponential(key_2, domain, ids_N) -> jax.Array:
    return noise.exponential(noise.bits(key_2[None], domain, ids_N[None])[0])


def _finite(x) -> jax.Array:
    return jnp.where(jnp.isinf(x), 0.0, x)
