"""Metrics of a loss that add up over micro-batches, devices and minibatches.

A mean of means is wrong when the parts differ in size, and a maximum must not be added. So a loss
hands out sums over its mask and maxima over its mask, and only the whole is divided.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxconv.objectives import masked


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spread:
    """How numbers scatter, float32 scalars (Chan et al. 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances").

    Sums of x and x² would tell it too, but lose its digits where the mean is large beside it.

    count: how many numbers.
    mean: of them.
    squares: sum of their squared distances from it.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @classmethod
    def of(cls, x: jax.Array, mask: jax.Array) -> "Spread":
        """That of the entries of `x` which `mask` selects."""
        mean = masked.masked_mean(x, mask)
        squares = masked.masked_sum(jnp.square(masked.floating(x) - mean), mask)
        return cls(masked.count(mask).astype(mean.dtype), mean, squares)

    def merge(self, other: "Spread") -> "Spread":
        """That of both parts together."""
        share = other.count / jnp.maximum(self.count + other.count, 1.0)
        apart = other.mean - self.mean
        return Spread(
            self.count + other.count,
            self.mean + apart * share,
            self.squares + other.squares + jnp.square(apart) * self.count * share,
        )

    def across(self, total: Callable[[jax.Array], jax.Array]) -> "Spread":
        """That of all parts together, where `total` adds up a number over them."""
        count = total(self.count)
        mean = total(self.count * self.mean) / jnp.maximum(count, 1.0)
        return Spread(count, mean, total(self.squares + self.count * jnp.square(self.mean - mean)))

    @property
    def std(self) -> jax.Array:
        """Population standard deviation; 0 of no numbers."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1.0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """Unfinished metrics; a pytree.

    sums: name -> sum over the mask; two parts merge by adding.
    maxima: name -> maximum over the mask, −inf for an empty one; two parts merge by the larger.
    spreads: name -> scatter over the mask.
    """

    sums: Mapping[str, jax.Array]
    maxima: Mapping[str, jax.Array] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of both parts together; both must come from the same loss."""
        return Metrics(
            jax.tree.map(jnp.add, self.sums, other.sums),
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
            {name: one.merge(other.spreads[name]) for name, one in self.spreads.items()},
        )

    def reduce(self) -> "Metrics":
        """The metrics of all parts stacked along the leading axis, as `lax.scan` stacks them."""
        return Metrics(
            jax.tree.map(lambda x: jnp.sum(x, axis=0), self.sums),
            jax.tree.map(lambda x: jnp.max(x, axis=0), self.maxima),
            {name: x.across(lambda x: jnp.sum(x, axis=0)) for name, x in self.spreads.items()},
        )

    def means(self, denominator: jax.Array) -> dict[str, jax.Array]:
        """Every sum over `denominator` (the merged count; at least 1), every maximum as is, and of
        every spread the standard deviation."""
        divisor = jnp.maximum(denominator, 1.0)
        means = {name: x / divisor for name, x in self.sums.items()}
        return means | dict(self.maxima) | {name: x.std for name, x in self.spreads.items()}
