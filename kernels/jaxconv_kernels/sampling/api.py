"""`sample`: one token a row from a batch of logits, by the form that suits the platform.

The order is: allowed-token mask, temperature, top-k, renormalise, top-p, min-p. Every filter keeps
the tokens whose logit is at least some threshold of the row, so ties at the threshold all stay and
the likeliest token always does. A row's token depends on its own logits, parameters and key only,
never on the rest of the batch. `jaxconv_kernels.sampling.spec` defines every number.
"""

import functools

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling import gpu, reference, tpu, xla
from jaxconv_kernels.sampling.axis import Axis
from jaxconv_kernels.sampling.spec import CELL, LANES, Sampled, is_small, row_parameters

IMPLEMENTATIONS = {
    "xla": xla.sample,
    "multipass": functools.partial(xla.sample, multipass=True),
    "reference": reference.sample,
    "tpu": tpu.sample,
    "gpu": gpu.sample,
}


def running(implementation: str | None, vocab: int) -> str:
    """The implementation that `sample` runs for a vocabulary when it is asked for this one.

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation is None:
        implementation = jax.default_backend()
        if implementation == "cpu" or (implementation == "gpu" and not _is_hopper()):
            implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}; it must be one of {known}")
    most = {"tpu": CELL * LANES}.get(implementation, vocab)
    in_pallas = implementation in ("tpu", "gpu")
    return "xla" if in_pallas and (is_small(vocab) or vocab > most) else implementation


def _is_hopper() -> bool:
    return jax.devices()[0].compute_capability.startswith("9.")


def sample(
    logits: jax.Array,
    keys: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
    min_p: jax.Array | float = 0.0,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> Sampled:
    """Draws one token for each row.

    Filtered rows (any of top-k, top-p, min-p on) are drawn by the Gumbel-max rule with the row's
    key: exactly `jax.random.categorical(key, z)` with z = (logit - max) * (1 / temperature) on kept
    tokens and -inf elsewhere. Unfiltered rows are drawn in two levels, a cell and a token in it,
    from the same distribution with far fewer random numbers.

    Args:
        logits: float32 or bfloat16 [B, V]. NaN counts as -inf. An allowed +inf wins, the lowest
            index among several.
        keys: typed threefry keys [B]. Never reuse a key.
        temperature: float, or [B]; 0 or less, and NaN, is greedy, and the lowest index wins a tie.
            It counts as 1e-12 at least and 1e30 at most.
        top_k: int, or [B]; at most 0, or at least V, is off.
        top_p: float, or [B]; at least 1, and NaN, is off.
        min_p: float, or [B]; least probability as a share of the likeliest; at most 0, and NaN, is
            off.
        mask: uint32 [B, ceil(V / 32)], bit i of word w set where token 32 w + i is allowed, as
            `pack_mask` makes it; None allows all.
        implementation: "xla"; "multipass", which is the same without the candidate lists and serves
            to measure them; "reference", the plain definition; "tpu", and "gpu" of the Hopper
            class, the Pallas kernels, of arrays that one device holds whole. None takes the
            platform's. A vocabulary of at most 4096 tokens, or of more than 262,144 on a TPU, takes
            "xla" for "tpu" and "gpu".

    Raises:
        ValueError: an argument has another shape or type, or the implementation is unknown.
    """
    logits, mask = jnp.asarray(logits), None if mask is None else jnp.asarray(mask)
    keys_B2 = _checked(logits, keys, mask)
    rows, vocab = logits.shape
    parameters = row_parameters(rows, vocab, temperature, top_k, top_p, min_p)
    draw = IMPLEMENTATIONS[running(implementation, vocab)]
    return draw(logits, keys_B2, parameters, mask)


def sample_sharded(
    logits_shard: jax.Array,
    keys: jax.Array,
    *,
    axis_name: str,
    temperature: jax.Array | float = 1.0,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
    min_p: jax.Array | float = 0.0,
    mask: jax.Array | None = None,
) -> Sampled:
    """`sample` inside a `shard_map`, with check_vma=False, whose mesh axis splits the vocabulary.

    Tokens, thresholds and log-probs are those of `sample` on the whole rows, the same on every
    device of the axis. It runs in XLA on every platform. Devices exchange 32 KiB of candidates and
    a few bytes a cell for each filtered row, not its logits, except in a vocabulary of at most 4096
    tokens.

    Args:
        logits_shard: float32 or bfloat16 [B, V / devices], consecutive tokens. A vocabulary above
            4096 is split on cell boundaries, at multiples of 2048 tokens: pad it with -inf.
        keys, temperature, top_k, top_p, min_p: as of `sample`, the same on every device of the
            axis.
        axis_name: of the mesh axis.
        mask: uint32 [B, ceil(V / devices / 32)], of the piece, or None.

    Raises:
        ValueError: a boundary between devices is not a boundary between cells.
    """
    keys_B2 = _checked(logits_shard, keys, mask)
    rows, piece = logits_shard.shape
    axis = Axis(axis_name)
    vocab = piece * axis.size()
    if not is_small(vocab) and piece % CELL:
        raise ValueError(
            f"logits_shard has {piece} of {vocab} tokens; it must have a multiple of {CELL}, so "
            "that no cell lies on two devices"
        )
    parameters = row_parameters(rows, vocab, temperature, top_k, top_p, min_p)
    return xla.sample(logits_shard, keys_B2, parameters, mask, axis=axis)


def _checked(logits, keys, mask) -> jax.Array:
    """Key data uint32 [B, 2], once all shapes and types fit."""
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {logits.shape}; it must be [B, V], neither zero")
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"logits is {logits.dtype}; it must be float32 or bfloat16")
    if any(spec := jax.typeof(logits).sharding.spec):
        raise ValueError(
            f"logits is split over devices by its type, as {spec}; call `sample`, or where the "
            "vocabulary is split `sample_sharded`, inside a shard_map"
        )
    rows, vocab = logits.shape
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"keys is {keys.dtype}; it must be typed keys, as of jax.random.key")
    keys_B2 = jax.random.key_data(keys)
    if keys_B2.shape != (rows, 2) or str(jax.random.key_impl(keys)) != "threefry2x32":
        raise ValueError(f"keys is {keys.dtype}{keys.shape}; it must be threefry keys [{rows}]")
    words = -(-vocab // 32)
    if mask is not None and (mask.dtype != jnp.uint32 or mask.shape != (rows, words)):
        raise ValueError(
            f"mask is {mask.dtype}{mask.shape}; it must be uint32[{rows}, {words}], as of pack_mask"
        )
    return keys_B2
