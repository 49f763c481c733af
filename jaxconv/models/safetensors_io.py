"""Checkpoint tensors on disk: single or sharded safetensors files, checked before they are read."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxconv.errors import Refused

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorFiles:
    """The tensors of some safetensors files by name, read one at a time.

    Opening a file checks that it is whole.

    Attributes:
        shapes: name to shape.
        dtypes: name to "float32", "bfloat16" or "float16".
    """

    def __init__(self, paths: Iterable[Path]):
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in paths:
            self._open(path)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise Refused(
                f"{path} is not a whole safetensors file ({size} bytes): {error}"
            ) from error
        for name in handle.keys():  # noqa: SIM118  (a handle, not a dictionary)
            if name in self._file_of:
                raise Refused(f"{path}: tensor {name} is also in {self._file_of[name]}")
            piece = handle.get_slice(name)
            stored = piece.get_dtype()
            if stored not in _DTYPES:
                raise Refused(f"{path}: tensor {name} is {stored}; it may be {', '.join(_DTYPES)}")
            self._file_of[name] = path
            self._handles[name] = handle
            self.shapes[name] = tuple(piece.get_shape())
            self.dtypes[name] = _DTYPES[stored]

    def file(self, name: str) -> Path | None:
        """The file that holds a tensor."""
        return self._file_of.get(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        return self._handles[name].get_tensor(name)


def open_checkpoint(folder: Path) -> TensorFiles:
    """The weights of a folder: `model.safetensors`, else the shards that the index lists.

    Raises Refused when there are none, a shard is missing or the index and the shards disagree.
    """
    if (folder / SINGLE).is_file():
        return TensorFiles([folder / SINGLE])
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
    files = TensorFiles(folder / shard for shard in shards)
    for name, shard in weight_map.items():
        if files.file(name) != folder / shard:
            raise Refused(f"{folder / shard} has no tensor {name}; {INDEX} says it does")
    return files


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, int, Any]], max_shard_bytes: float
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, holding one shard at a time.

    Args:
        folder: an existing folder.
        tensors: (name, bytes, function that returns the array) in the order of the files.
        max_shard_bytes: a shard closes before it would pass this; one tensor is never split.
    """
    shards: list[list[tuple[str, Any]]] = [[]]
    sizes = [0]
    for name, size, make in tensors:
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append((name, make))
        sizes[-1] += size
    names = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard
        }
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    for file, shard in zip(names, shards, strict=True):
        save_tensors({name: make() for name, make in shard}, folder / file)


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Writes one safetensors file that whoever may read the user's other files may read too."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode  # the library would make it private
    # transformers reads only files that name a framework.
    save_file(dict(tensors), path, {"format": "pt"})
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or Refused with the file's name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise Refused(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder, deepest folders included."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
