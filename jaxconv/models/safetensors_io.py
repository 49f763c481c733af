"""Checkpoint tensors on disk: single or sharded safetensors files, checked before they are read."""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxconv.errors import Refused

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is made only as it is written.

    Attributes:
        name: in the checkpoint.
        shape: in the checkpoint.
        dtype: in the checkpoint, "float32", "bfloat16" or "float16".
        make: returns an array of that shape; it is cast as it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class TensorFiles:
    """The tensors of some safetensors files by name, read one at a time.

    Opening a file checks that it is whole. Tensors are read from the file rather than through a
    memory map, whose pages would stay resident as a second copy of the weights.

    Args:
        paths: of the files.
        leave_out: names of tensors that are none of the model's, whatever their type.

    Attributes:
        shapes: name to shape.
        dtypes: name to "float32", "bfloat16" or "float16".
    """

    def __init__(
        self, paths: Iterable[Path], leave_out: Callable[[str], bool] = lambda name: False
    ):
        self._leave_out = leave_out
        self._place: dict[str, tuple[Path, int]] = {}  # file and offset of the first byte
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in paths:
            self._open(path)

    def _open(self, path: Path) -> None:
        for name, entry, start in _entries(path):
            if self._leave_out(name):
                continue
            if name in self._place:
                raise Refused(f"{path}: tensor {name} is also in {self.file(name)}")
            if entry["dtype"] not in _DTYPES:
                raise Refused(
                    f"{path}: tensor {name} is {entry['dtype']}; it may be {', '.join(_DTYPES)}"
                )
            self._place[name] = (path, start)
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = _DTYPES[entry["dtype"]]

    def file(self, name: str) -> Path | None:
        """The file that holds a tensor."""
        return self._place[name][0] if name in self._place else None

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        path, start = self._place[name]
        shape, dtype = self.shapes[name], jnp.dtype(self.dtypes[name])
        return np.fromfile(path, dtype, math.prod(shape), offset=start).reshape(shape)

    def rename(self, name_of: Callable[[str], str | None]) -> None:
        """Gives every tensor the name that `name_of` returns for it; None leaves it out."""
        for table in (self._place, self.shapes, self.dtypes):
            pairs = [(name_of(name), value) for name, value in table.items()]
            table.clear()
            table.update((name, value) for name, value in pairs if name is not None)


def _entries(path: Path) -> list[tuple[str, dict[str, Any], int]]:
    """(name, header entry, offset of the first byte) of a file's tensors, once it is checked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise Refused(f"{path} is not a whole safetensors file ({size} bytes): {error}") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [(name, entry, 8 + length + entry["data_offsets"][0]) for name, entry in header.items()]


def open_checkpoint(
    folder: Path, leave_out: Callable[[str], bool] = lambda name: False
) -> TensorFiles:
    """The weights of a folder: `model.safetensors`, else the shards that the index lists.

    Raises Refused when there are none, a shard is missing or the index and the shards disagree.
    """
    if (folder / SINGLE).is_file():
        return TensorFiles([folder / SINGLE], leave_out)
    if not (folder / INDEX).is_file():
        raise Refused(f"{folder} has neither {SINGLE} nor {INDEX}; weights must be safetensors")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{folder / INDEX} has no weight_map")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise Refused(f"{folder / INDEX}: shard {shard!r} must be a plain file name")
        if not (folder / shard).is_file():
            raise Refused(f"{folder / shard} is missing; {INDEX} lists it")
    files = TensorFiles((folder / shard for shard in shards), leave_out)
    for name, shard in weight_map.items():
        if not leave_out(name) and files.file(name) != folder / shard:
            raise Refused(f"{folder / shard} has no tensor {name}; {INDEX} says it does")
    return files


def plan_files(tensors: Iterable[Tensor], max_shard_bytes: float) -> dict[str, list[Tensor]]:
    """What goes into which file: `model.safetensors`, or numbered shards.

    Args:
        tensors: in the order of the files.
        max_shard_bytes: a shard closes before it would pass this; one tensor is never split.
    """
    shards: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in tensors:
        if shards[-1] and sizes[-1] + tensor.nbytes > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += tensor.nbytes
    count = len(shards)
    if count == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": x for i, x in enumerate(shards)}


def write_tensors(folder: Path, tensors: Iterable[Tensor], max_shard_bytes: float) -> None:
    """Writes the files of `plan_files`, and the index of several, holding one tensor at a time."""
    files = plan_files(tensors, max_shard_bytes)
    if len(files) > 1:
        weight_map = {tensor.name: file for file, shard in files.items() for tensor in shard}
        size = sum(tensor.nbytes for shard in files.values() for tensor in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    for file, shard in files.items():
        save_tensors(shard, folder / file)


def make_tensors(tensors: Iterable[Tensor]) -> None:
    """Makes the tensors one by one, as `write_tensors` does, and writes none."""
    for tensor in tensors:
        tensor.make()


def save_tensors(tensors: Iterable[Tensor], path: Path) -> None:
    """Writes one safetensors file: the header's length, the header, the bytes in its order."""
    tensors = list(tensors)
    # transformers reads only files that name a framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        stored = {known: stored for stored, known in _DTYPES.items()}[tensor.dtype]
        entry = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make(), jnp.dtype(tensor.dtype))
            file.write(array.reshape(-1).view(np.uint8))
            del array  # before the next is made


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object, or a list where `kind` says so; Refused with the file's name otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise Refused(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, kind):
        wanted = {dict: "a JSON object", list: "a JSON list"}[kind]
        raise Refused(f"{path} holds a {type(value).__name__}; it must be {wanted}")
    return value


def write_json(path: Path, value: dict[str, Any] | list[Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
