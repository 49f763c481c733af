"""Pallas kernels and their XLA references; imports jax and nothing of jaxconv."""

from jaxconv_kernels.linear_logprob import linear_logprob
from jaxconv_kernels.sampling import Sampled, sample

__all__ = ["Sampled", "linear_logprob", "sample"]
