"""Attention of one new token a row, written into a cache of which each row fills its own part."""

from jaxconv_kernels.decode_attention.api import decode_attention, running

__all__ = ["decode_attention", "running"]
