"""FLOPs and bytes that the work on a decoder takes by its formulas, whoever runs it.

Matrix products only, 2 FLOPs a multiply-add. Attention is counted causally: the query at position t
of a row sees t + 1 keys, so a row of T tokens counts T (T + 1) / 2 pairs, not T², whatever the
kernel computes and masks away; a sliding layer counts the keys of its window. A number from here
divided by time and peak is the model FLOPs utilization (MFU, Chowdhery et al. 2022, arXiv
2204.02311, here with causal attention); recomputed activations do not raise it. Streams that are
packed into one row count each by itself, and padding counts nothing.

With N weights in matmuls, the head included, L layers, Q = heads times head width, and rows of T
tokens, all without windows:

    forward  = tokens (2 N + 4 L Q (T + 1) / 2)
    training = 3 forward
    decoding = rows (2 N + 4 L Q context)
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxconv.models.config import DecoderConfig
from jaxconv.perf.chips import Chip, chip_of

_BYTES = {"float32": 4, "bfloat16": 2}


def forward_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Of scoring `rows` rows of `length` tokens, logits of every token included."""
    return rows * float(np.sum(config.flops_per_token(np.arange(1, length + 1))))


def stream_flops(config: DecoderConfig, lengths: Sequence[int]) -> float:
    """Of scoring streams of these lengths, each by itself, however they are packed into rows."""
    lengths = np.asarray(lengths, np.int64)
    steps = np.arange(1, lengths.max(initial=0) + 1)
    upto = np.concatenate([[0.0], np.cumsum(config.flops_per_token(steps))])
    return float(upto[lengths].sum())


def stream_training_flops(
    config: DecoderConfig, lengths: Sequence[int], *, trains_weights: bool = True
) -> float:
    """Of the forward and backward pass over streams of these lengths; see `training_flops`."""
    weights = 0 if trains_weights else float(np.sum(lengths)) * float(config.flops_per_token(0))
    return 3 * stream_flops(config, lengths) - weights


def rollout_flops(config: DecoderConfig, lengths: Sequence[int], sampled: int) -> float:
    """Of talks whose streams have these lengths, each token computed once; only the `sampled` ones
    need logits."""
    heard = float(np.sum(lengths)) - sampled
    return stream_flops(config, lengths) - heard * 2.0 * config.vocab_size * config.embed_dim


def training_flops(
    config: DecoderConfig, rows: int, length: int, *, trains_weights: bool = True
) -> float:
    """Of the forward and backward pass over `rows` rows of `length` tokens.

    Each forward product has two in the backward pass, one for its input and one for its weight.

    Args:
        trains_weights: False where the weights rest below an adapter, whose own products are not
            counted: the half of the backward pass that is for the weights falls away.
    """
    forward = forward_flops(config, rows, length)
    weights = rows * length * float(config.flops_per_token(0))
    return 3 * forward - (0 if trains_weights else weights)


def recomputed_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """What `config.remat` adds to `training_flops`, causally counted too.

    "full" runs a layer again but for the last matmul of its MLP, whose output nothing needs;
    "dots" runs attention again, whose products are not kept.
    """
    attention = forward_flops(config, rows, length) - rows * length * config.flops_per_token(0)
    d, q, kv = (
        config.embed_dim,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    maps = config.num_layers * (2 * d * (q + kv) + 2 * d * config.mlp_dim)
    return {"none": 0.0, "dots": attention, "full": attention + 2.0 * maps * rows * length}[
        config.remat
    ]


def prefill_flops(config: DecoderConfig, rows: int, length: int, start: int = 0) -> float:
    """Of writing `length` tokens of each row into a cache that holds `start`; no logits."""
    context = np.arange(start + 1, start + length + 1)
    head = 2.0 * config.vocab_size * config.embed_dim
    return rows * float(np.sum(config.flops_per_token(context) - head))


def decode_flops(config: DecoderConfig, rows: int, context: float) -> float:
    """Of one token for each row, which sees `context` positions, itself included."""
    return rows * float(config.flops_per_token(context))


def splash_flops(config: DecoderConfig, rows: float, length: int) -> dict[str, float]:
    """FLOPs of one call of each kernel of splash attention, which come without an estimate.

    For `kernels` of `perf.hlo.program_cost`: rows (of one device) of `length` tokens, causal pairs
    only, and the mean over the layers where some slide. The forward kernel has two products a pair,
    the one for the gradient of queries three, that of keys and values four.

    Args:
        rows: rows of one call on one device, times the share of the heads that the device has.
    """
    steps = np.arange(1, length + 1)
    forward = config.flops_per_token(steps) - config.flops_per_token(0)
    product = rows * float(np.sum(forward)) / config.num_layers / 2
    return {
        "splash_mha_fwd": 2 * product,
        "splash_mha_dq": 3 * product,
        "splash_mha_dkv": 4 * product,
    }


def kv_cache_bytes(config: DecoderConfig, rows: int, length: int) -> int:
    """Of the keys and values of `rows` rows with room for `length` positions, compute dtype."""
    heads = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return heads * _BYTES[config.dtype] * rows * length


def decode_bytes(config: DecoderConfig, rows: int, context: float) -> float:
    """What one decode step must read: each weight once in the compute dtype, and the cache.

    Of an untied embedding only the rows of the tokens are read, and they are not counted. A sliding
    layer reads the positions of its window.
    """
    heads = 1 if config.tie_embeddings else 2
    weights = config.num_parameters - (heads - 1) * config.vocab_size * config.embed_dim
    seen = sum(context if w is None else min(context, w) for w in config.windows)
    keys = 2 * config.num_kv_heads * config.head_dim * seen
    return _BYTES[config.dtype] * (weights + rows * keys)


def decode_rate_ceiling(
    config: DecoderConfig, rows: int, context: float, chip: Chip, devices: int = 1
) -> float:
    """Most tokens per second of `rows` rows at this context: memory's limit or compute's.

    The devices split both the weights and the cache, and nothing is lost to their exchange.
    """
    reading = decode_bytes(config, rows, context) / (devices * chip.device_hbm_rate)
    computing = decode_flops(config, rows, context) / (devices * chip.device_flops(config.dtype))
    return rows / max(reading, computing)


def mfu(flops: float, seconds: float, chip: Chip, devices: int, dtype: str = "bfloat16") -> float:
    """Model FLOPs utilization: `flops` of all devices over what they could do in that time."""
    return flops / (seconds * devices * chip.device_flops(dtype))


def rates_of(flops: float, seconds: float, dtype: str) -> dict[str, float]:
    """Of work that all devices of the run have done in this time: `flops_per_s`, and `mfu` where
    the peak of the devices is known, which it is not of a CPU."""
    out = {"flops_per_s": flops / seconds}
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None:
        out["mfu"] = mfu(flops, seconds, chip, jax.device_count(), dtype)
    return out
