"""Chosen-token log-probability and entropy straight from hidden states and the output matrix."""

from jaxconv_kernels.linear_logprob.api import linear_logprob
from jaxconv_kernels.linear_logprob.mesh import sharded_linear_logprob

__all__ = ["linear_logprob", "sharded_linear_logprob"]
