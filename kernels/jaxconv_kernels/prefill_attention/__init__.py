"""Attention of a piece of some rows to a cache that holds the piece already."""

from jaxconv_kernels.prefill_attention.api import prefill_attention, running

__all__ = ["prefill_attention", "running"]
