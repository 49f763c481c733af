"""Decoders, their heads and shardings, and Hugging Face checkpoints in and out."""
