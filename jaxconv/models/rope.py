"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv.models.config import DecoderConfig, RopeScaling


def rope_frequencies(config: DecoderConfig, *, slides: bool = False) -> tuple[np.ndarray, float]:
    """(inverse frequencies, float32 [head_dim / 2], radians a token; factor on cos and sin).

    `slides` asks for those of sliding layers, which in Gemma 3 have a base of their own and no
    scaling. A host constant. Computed in float32 as the checkpoints' own code does, so that angles
    at long positions agree with training.
    """
    dim = config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    theta, scaling = config.rope_theta, config.rope_scaling
    if slides and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, None
    inv_freq = np.float32(1.0) / np.float32(theta) ** exponents
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    return _yarn(inv_freq, scaling, theta, dim), scaling.attention_factor


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / inv_freq
    turns = scaling.original_max_positions / wavelengths
    band = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / band, 0, 1)
    return ((1 - keep) * inv_freq / scaling.factor + keep * inv_freq).astype(np.float32)


def _yarn(inv_freq: np.ndarray, scaling: RopeScaling, theta: float, dim: int) -> np.ndarray:
    """YaRN's "NTK by parts": a ramp over dimensions between `beta_fast` and `beta_slow` turns."""

    def dimension_of(turns: float) -> float:
        wavelength = scaling.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)).astype(np.float32)


def rope_tables(
    config: DecoderConfig, positions_BT: jax.Array, *, slides: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of integer positions [..., T], each float32 [..., T, head_dim / 2].

    `slides` asks for those of sliding layers, as in `rope_frequencies`.
    float32 throughout: bfloat16 cannot tell position 257 from 256.
    """
    inv_freq, factor = rope_frequencies(config, slides=slides)
    angles = positions_BT[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the halves of x [..., T, heads, head_dim] by the tables [..., T, head_dim / 2].

    Dimension i pairs with i + head_dim / 2 (the layout of Hugging Face checkpoints). Computed in
    float32, returned in x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
