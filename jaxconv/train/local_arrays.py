"""Arrays of one process alone in a file: what a checkpoint of all processes cannot hold, because
each of them has its own, of shapes of its own."""

import json
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from jaxconv import storage
from jaxconv.durable import publish
from jaxconv.train import atomic


def save(path: PurePath, arrays: Any) -> None:
    """Writes the arrays of a pytree, bit for bit; the file is whole and on disk when this returns.

    `path` may be an `epath.Path` on an object store, where an object is whole or not there.

    Raises:
        jaxconv.errors.Failed: the disk is full.
    """
    leaves = jax.tree.leaves(arrays)
    header = json.dumps([_described(leaf) for leaf in leaves])
    stored = storage.is_url(path)
    partial = path if stored else path.with_name(f".{path.name}.partial")
    with atomic.disk_full_is_failure(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(f"{header}\n".encode())
                for leaf in leaves:  # one after the other: together they may be gigabytes
                    file.write(np.asarray(leaf).tobytes())
            if not stored:
                publish(partial, path)
        except BaseException:
            if not stored:
                partial.unlink(missing_ok=True)
            raise


def fits(path: PurePath, like: Any) -> bool:
    """Whether the file is there and holds arrays of these shapes and dtypes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return json.loads(file.readline()) == [_described(leaf) for leaf in jax.tree.leaves(like)]


def load(path: PurePath, like: Any) -> Any:
    """The pytree that `save` wrote, as numpy arrays; the file `fits`."""
    leaves, tree = jax.tree.flatten(like)
    with path.open("rb") as file:
        file.readline()
        found = [
            np.frombuffer(file.read(leaf.dtype.itemsize * leaf.size), leaf.dtype) for leaf in leaves
        ]
    return jax.tree.unflatten(
        tree, [x.reshape(leaf.shape) for x, leaf in zip(found, leaves, strict=True)]
    )


def _described(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]
