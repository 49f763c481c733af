"""Checkpoints: a pytree of arrays and a JSON-able dictionary a step, saved in the background.

On disk a step is `<folder>/<step>/arrays` (Orbax's OCDBT, one entry a leaf, named by its path in
the pytree, such as `model/layers/attention/query`) and `<folder>/<step>/host` (JSON). Orbax writes
a step under a temporary name and renames it when it is whole (on an object store it writes a file
that says so), so a kill in the middle leaves the steps before it.
"""

import json
import logging
import math
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv import processes, storage
from jaxconv.errors import Refused
from jaxconv.train import atomic

PyTree = Any

# Orbax tells saves apart by a number of the whole process, which it reads again and again while one
# starts. Two folders' saves that start at once would wait for each other's files.
_starting_one = threading.Lock()


class Checkpoints:
    """The checkpoints of one stage in one folder.

    Args:
        folder: of a disk, or an `epath.Path` on an object store; made when the first step is saved.
            Temporary files of a killed save are removed.
        keep: how many of the latest steps stay; at least 1.
    """

    def __init__(self, folder: PurePath, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}; it must be at least 1")
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_is_not_raised_anyway)
        self._folder = folder if storage.is_url(folder) else Path(folder).resolve()
        self._ocp = ocp
        # Named processes wait for each other at the coordination service, not on their devices.
        several = jax.process_count() > 1
        # Nothing is renamed on an object store; a step is whole when a file says so.
        marked = ocp.path.atomicity.CommitFileTemporaryPath
        temporary = marked if storage.is_url(folder) else None
        everybody = set(range(jax.process_count())) if several else None
        with atomic.disk_full_is_failure(self._folder):
            if several:
                with processes.process_0_first(f"checkpoints in {self._folder}"):
                    self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    cleanup_tmp_directories=True,
                    create=not several,
                    temporary_path_class=temporary,
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        active_processes=everybody,
                        barrier_sync_key_prefix=self._folder.name if several else None,
                    ),
                ),
                item_names=("arrays", "host"),
            )
        self._latest: int | None = self._manager.latest_step()
        # Orbax saves in the background, but first works for tens of milliseconds in the calling
        # thread, which waits for other threads to start; here that is a thread of its own.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._starting: Future[None] | None = None

    def save(self, step: int, arrays: PyTree, host: dict[str, Any]) -> None:
        """Saves a step. It is on disk later; both arguments may be changed or donated at once.

        Args:
            step: larger than every step saved before.
            arrays: any pytree (NNX modules and optax states too) whose leaves are jax or numpy
                arrays or typed PRNG keys. Sharded arrays of several processes are written by their
                owners.
            host: JSON-able state of the host (environments, iterators, counters). Tuples come back
                as lists.

        Raises:
            TypeError: a leaf that is no array, or `host` is not JSON-able.
            jaxconv.errors.Failed: the disk is full (this save, or the one before it).
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step={step} of {self._folder}; it must be larger than {latest}")
        leaves = _named_leaves(arrays)
        index = {name: _describe(name, leaf) for name, leaf in leaves.items()}
        # Serialised here and now: the caller goes on changing its state while the writer works.
        record = json.loads(json.dumps({"index": {k: v.to_json() for k, v in index.items()}}))
        record["state"] = json.loads(json.dumps(host))
        stored = {name: _stored(leaf) for name, leaf in leaves.items() if index[name].size}
        items = self._ocp.args.Composite(
            arrays=self._ocp.args.StandardSave(stored), host=self._ocp.args.JsonSave(record)
        )
        with atomic.disk_full_is_failure(self._folder / str(step)):
            self._started()
            if jax.process_count() == 1:
                self._starting = self._starter.submit(self._start, step, items)
            else:
                # Processes meet at barriers, in the order of the main thread's other ones.
                self._start(step, items)
        self._latest = step

    def _start(self, step: int, items: Any) -> None:
        with _starting_one:
            self._manager.save(step, args=items)

    def latest(self) -> int | None:
        """The last step that was saved (or is being saved), None when there is none."""
        return self._latest

    def steps(self) -> list[int]:
        """Every step that is there, oldest first."""
        self.wait()
        return sorted(self._manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Removes every step after `step`: those of a life that a kill has ended."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)
        self._latest = self._manager.latest_step()

    def host(self, step: int) -> dict[str, Any]:
        """The host's state of a step alone: what the shapes of its arrays may depend on.

        Raises:
            Refused: no such step.
        """
        return self._record(step)["state"]

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads a step back, bit for bit.

        Args:
            step: one of `steps()`.
            like: a pytree of the saved structure. A leaf that is a jax array or a
                `jax.ShapeDtypeStruct` comes back as a jax array, with its sharding when it has one;
                a numpy leaf as a numpy array.

        Returns:
            `(arrays, host)` as they were given to `save`.

        Raises:
            Refused: no such step, or the names, shapes or dtypes differ; names the first leaf.
        """
        record = self._record(step)
        wanted = _named_leaves(like)
        found = {name: _Leaf(tuple(v[0]), v[1]) for name, v in record["index"].items()}
        self._refuse_other_shape(step, found, wanted)
        targets = {name: _target(leaf) for name, leaf in wanted.items() if found[name].size}
        stored = self._manager.restore(
            step, args=self._ocp.args.Composite(arrays=self._ocp.args.StandardRestore(targets))
        )["arrays"]
        # Orbax does not keep arrays without elements; the target of one is the array itself.
        restored = [
            _returned(leaf, stored[name] if found[name].size else _target(leaf))
            for name, leaf in wanted.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), restored), record["state"]

    def _record(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            raise Refused(f"{self._folder} has no step {step}; it has {self.steps()}")
        return self._manager.restore(
            step, args=self._ocp.args.Composite(host=self._ocp.args.JsonRestore())
        )["host"]

    def _refuse_other_shape(
        self, step: int, found: dict[str, "_Leaf"], wanted: dict[str, Any]
    ) -> None:
        place = self._folder / str(step)
        for name, leaf in wanted.items():
            expected = _describe(name, leaf)
            if name not in found:
                raise Refused(f"checkpoint {place} has no {name}; expected {expected}")
            if found[name] != expected:
                raise Refused(f"checkpoint {place}: {name} is {found[name]}; expected {expected}")
        for name in found:
            if name not in wanted:
                raise Refused(
                    f"checkpoint {place} has {name} {found[name]}, which is not expected here"
                )

    def wait(self) -> None:
        """Returns when every save is on disk.

        Raises:
            jaxconv.errors.Failed: the disk is full.
        """
        with atomic.disk_full_is_failure(self._folder):
            self._started()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and frees the threads behind them."""
        with atomic.disk_full_is_failure(self._folder):
            try:
                self._started()
            finally:
                self._starter.shutdown()
                self._manager.close()

    def _started(self) -> None:
        """Waits until Orbax has taken over the last save; raises what went wrong there."""
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.result()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _is_not_raised_anyway(record: logging.LogRecord) -> bool:
    """Leaves out the tracebacks that Orbax's threads print: `wait` and the next save raise them."""
    return not (record.exc_info and "orbax" in record.pathname)


@dataclass(frozen=True)
class _Leaf:
    """Shape and dtype as the index holds them; the dtype of typed keys is such as `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> list[Any]:
        return [list(self.shape), self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by stable, readable names. The `value` that `nnx.Param` adds to a path is left out."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_key_names(path)) or "value"
        if name in named:
            raise ValueError(f"two leaves of the pytree are both named {name}")
        named[name] = leaf
    return named


def _key_names(path: Iterable[Any]) -> list[str]:
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    last = list(path)[-1:]
    if len(names) > 1 and names[-1] == "value" and isinstance(last[0], jax.tree_util.GetAttrKey):
        names.pop()
    return [name.replace("/", "_") for name in names]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> _Leaf:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"checkpoint leaf {name} is a {type(leaf).__name__}; it must be a jax or numpy array "
            "(put plain values into `host`)"
        )
    return _Leaf(tuple(leaf.shape), str(leaf.dtype))


def _stored(leaf: Any) -> Any:
    """What Orbax gets: integers instead of typed keys, and a copy on the host where that can be.

    Numpy arrays cost the calling thread half of what jax arrays do, and the copy lets the caller
    donate its buffers at once. Arrays of several processes stay jax arrays: each owner writes its
    part.
    """
    if isinstance(leaf, jax.Array):
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:
            # Of a CPU's arrays Orbax would read the memory itself, after it has been donated.
            return jnp.copy(leaf) if next(iter(leaf.devices())).platform == "cpu" else leaf
    return np.array(leaf, copy=True)


def _target(leaf: Any) -> Any:
    """What Orbax shall read: arrays laid out on a mesh as such, all others on the host."""
    # The data of typed keys has one more axis, at the end; the same specification leaves it whole.
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding) and data.size:
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return np.empty(data.shape, data.dtype)


def _returned(like: Any, value: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        return value
    sharding = getattr(like, "sharding", None)
    if _is_key(like):
        value = jax.random.wrap_key_data(jnp.array(value), impl=_key_impl(like.dtype))
    elif not isinstance(value, jax.Array):
        # A copy: an array that shares numpy's memory could not be donated.
        value = jnp.array(value, dtype=like.dtype)
    # An array that no device was asked for stays so: committing it would compile its users again.
    if sharding is not None and getattr(like, "committed", True):
        value = jax.device_put(value, sharding)
    return value


def _key_impl(dtype: Any) -> str:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == dtype:
            return name
    raise TypeError(f"typed keys of dtype {dtype} cannot be restored")
