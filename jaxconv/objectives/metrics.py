"""Metrics of a loss that add up over micro-batches, devices and minibatches.

A mean of means is wrong when the parts differ in size, and a maximum must not be added. So a loss
hands out sums over its mask and maxima over its mask, and only the whole is divided.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """Unfinished metrics; a pytree.

    sums: name -> sum over the mask; two parts merge by adding.
    maxima: name -> maximum over the mask, −inf for an empty one; two parts merge by the larger.
    """

    sums: Mapping[str, jax.Array]
    maxima: Mapping[str, jax.Array] = field(default_factory=dict)

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of both parts together; both must come from the same loss."""
        return Metrics(
            jax.tree.map(jnp.add, self.sums, other.sums),
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
        )

    def reduce(self) -> "Metrics":
        """The metrics of all parts stacked along the leading axis, as `lax.scan` stacks them."""
        return Metrics(
            jax.tree.map(lambda x: jnp.sum(x, axis=0), self.sums),
            jax.tree.map(lambda x: jnp.max(x, axis=0), self.maxima),
        )

    def means(self, denominator: jax.Array) -> dict[str, jax.Array]:
        """Every sum over `denominator` (the merged count; at least 1) and every maximum as is."""
        divisor = jnp.maximum(denominator, 1.0)
        return {name: x / divisor for name, x in self.sums.items()} | dict(self.maxima)
