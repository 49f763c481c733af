"""jaxconv: turns conversations into better conversational models, in JAX."""

__version__ = "0.1.0"
