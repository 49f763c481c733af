"""What devices that share a vocabulary tell each other; alone, a device tells itself.

Every combination is of numbers in the order of the vocabulary, or exact: nothing is summed in
floating point in an order that the number of devices would change.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxconv_kernels.sampling.spec import NO_TOKEN


@dataclasses.dataclass(frozen=True)
class Axis:
    """A mesh axis over which the vocabulary is split in equal pieces, inside a `shard_map`.

    Attributes:
        name: of the axis; None where one device holds the vocabulary.
    """

    name: str | None = None

    def size(self) -> int:
        """Devices."""
        return 1 if self.name is None else jax.lax.axis_size(self.name)

    def index(self) -> jax.Array | int:
        """Which piece this device holds."""
        return 0 if self.name is None else jax.lax.axis_index(self.name)

    def concatenate(self, x: jax.Array, dim: int = -1) -> jax.Array:
        """The pieces of all devices along `dim`."""
        if self.name is None:
            return x
        return jax.lax.all_gather(x, self.name, axis=dim % x.ndim, tiled=True)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of integers, or of floats of which all but one device hold zeros."""
        return x if self.name is None else jax.lax.psum(x, self.name)

    def least(self, x: jax.Array) -> jax.Array:
        """The least number of any device."""
        return x if self.name is None else jax.lax.pmin(x, self.name)

    def greatest(self, x: jax.Array) -> jax.Array:
        """The greatest number of any device."""
        return x if self.name is None else jax.lax.pmax(x, self.name)

    def first_largest(self, best: jax.Array, token: jax.Array) -> jax.Array:
        """The token of the device whose `best` is largest; the lowest such token."""
        if self.name is None:
            return token
        largest = self.greatest(best)
        return self.least(jnp.where(best == largest, token, NO_TOKEN))
