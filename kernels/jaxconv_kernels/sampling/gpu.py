"""The sampler for NVIDIA GPUs of the Hopper class: one reading of the logits, in Mosaic GPU.

A first kernel reads the logits, in as many programs as fill the device; a second draws every row
from what the first left. Two kernels rather than one, because rows are read in parts and drawn
whole. A third takes the exact passes over filtered rows whose candidates were not enough, and has
nothing to do where there are none.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxconv_kernels.sampling import cells, finish, gpu_draw, gpu_exact, gpu_read, spec, xla
from jaxconv_kernels.sampling.mask import unpack_mask
from jaxconv_kernels.sampling.spec import CELL, LANES, RowParameters, Sampled

_PROGRAMS = 264  # two on each of 132 multiprocessors
_PARTS = 8  # more of a row would cost more to merge than their reading saves


def sample(
    logits: jax.Array,
    keys_B2: jax.Array,
    parameters: RowParameters,
    mask: jax.Array | None,
    *,
    parts: int | None = None,
    interpret=None,
) -> Sampled:
    """Samples rows [B, V]; arguments as of `xla.sample`, which takes small vocabularies.

    A vocabulary that is not a multiple of 128 is copied once to be one.

    Args:
        parts: programs that share the reading of a row; None takes as many as fill the device.
        interpret: Pallas's parameters for running it as plain operations on a CPU.
    """
    rows, vocab = logits.shape
    if spec.is_small(vocab):
        return xla.sample(logits, keys_B2, parameters, mask)
    if parts is None:
        parts = max(1, min(_PARTS, _PROGRAMS // rows))
    allowed_BCL = None if mask is None else _by_lane(mask, vocab)
    logits_BRL = jnp.pad(logits, ((0, 0), (0, -vocab % LANES)), constant_values=-jnp.inf)
    logits_BRL = logits_BRL.reshape(rows, -1, LANES)

    filtered_B = parameters.filtered
    reading = gpu_read.read(
        logits_BRL,
        allowed_BCL,
        parameters.scale,
        filtered_B.astype(jnp.int32),
        parts=min(parts, pl.cdiv(vocab, CELL)),
        interpret=interpret,
    )
    drawn = gpu_draw.draw(
        reading, logits_BRL, allowed_BCL, keys_B2, parameters, interpret=interpret
    )
    empty_B, infinite_B = jnp.isneginf(drawn.largest), jnp.isposinf(drawn.largest)
    certain_B = parameters.greedy | infinite_B | empty_B
    filtered_B &= ~certain_B
    row = cells.Mass(drawn.largest, cells.finite(drawn.largest), drawn.total)

    fallback_B = filtered_B & (drawn.certified == 0)
    exact = gpu_exact.draw(
        fallback_B,
        reading.largest[:, 1],
        logits_BRL,
        allowed_BCL,
        keys_B2,
        row,
        parameters,
        interpret=interpret,
    )
    threshold_B = jnp.where(fallback_B, exact.threshold, drawn.threshold)
    kept_B = jnp.where(fallback_B, exact.kept_mass, drawn.kept_mass)
    kept = finish.Kept(threshold_B, threshold_B, kept_B)
    token_B = jnp.where(empty_B, 0, jnp.where(fallback_B, exact.token, drawn.token))
    raw_B = spec.clean(jnp.take_along_axis(logits, token_B[:, None], axis=1)[:, 0])
    raw_row = cells.Mass(drawn.raw_largest, cells.finite(drawn.raw_largest), drawn.raw_total)
    return xla.report(token_B, raw_B, row, raw_row, parameters, kept, fallback_B)


def _by_lane(mask: jax.Array, vocab: int) -> jax.Array:
    """The packed mask as `gpu_read.read` takes it."""
    allowed = unpack_mask(mask, vocab)
    allowed = jnp.pad(allowed, ((0, 0), (0, -vocab % CELL)))
    allowed = allowed.reshape(len(mask), -1, CELL // LANES, LANES).astype(jnp.int32)
    return jnp.sum(allowed << jnp.arange(CELL // LANES, dtype=jnp.int32)[:, None], axis=2)
