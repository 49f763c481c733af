"""Pallas kernels and their XLA references; imports jax and nothing of jaxconv."""

from jaxconv_kernels.decode_attention import decode_attention
from jaxconv_kernels.linear_logprob import linear_logprob, sharded_linear_logprob
from jaxconv_kernels.prefill_attention import prefill_attention
from jaxconv_kernels.sampling import Sampled, pack_mask, sample, sample_sharded

__all__ = [
    "Sampled",
    "decode_attention",
    "linear_logprob",
    "pack_mask",
    "prefill_attention",
    "sample",
    "sample_sharded",
    "sharded_linear_logprob",
]
