"""Pallas kernels and their XLA references; imports jax and nothing of jaxconv."""
