"""Batched token sampling; `spec` is the definition, `api` the way in."""

from jaxconv_kernels.sampling.api import running, sample, sample_sharded
from jaxconv_kernels.sampling.mask import pack_mask
from jaxconv_kernels.sampling.spec import Sampled

__all__ = ["Sampled", "pack_mask", "running", "sample", "sample_sharded"]
