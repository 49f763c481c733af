"""Hugging Face checkpoints in and out: folders that `transformers` reads and writes."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxconv.errors import Failed, Refused
from jaxconv.models.config import DecoderConfig, token_ids
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ValueHead
from jaxconv.models.safetensors_io import (
    TensorFiles,
    files_below,
    open_checkpoint,
    read_json,
    save_tensors,
    write_json,
    write_tensors,
)
from jaxconv.models.sharding import shardings
from jaxconv.models.weights import (
    from_hf,
    hf_names,
    hf_shape,
    is_param,
    is_stacked,
    named_weights,
    to_hf,
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_VALUE_HEAD = "value_head.safetensors"


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Decoder, Any]:
    """Loads a decoder and its tokenizer.

    Weights stored as float32, bfloat16 or float16 become float32 masters, one weight at a time.
    Nothing is read before every file, name and shape has been checked.

    Args:
        path: a folder, or a hub id such as "Qwen/Qwen2.5-0.5B-Instruct".
        dtype: compute dtype, "float32" (the default) or "bfloat16".
        mesh: devices to split the weights over by `sharding.RULES`; None puts them on the default
            device.

    Returns:
        (model, tokenizer); the tokenizer is None when the folder holds none.

    Raises:
        Refused: the path, an unsupported architecture, or the first tensor that is missing,
            unexpected, of another shape or in a damaged file.
    """
    folder = _folder(path)
    config = _read_config(folder)
    files = open_checkpoint(folder)
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    _check_tensors(files, abstract, folder)
    config = replace(
        config, dtype=dtype or "float32", stored_dtype=_widest(set(files.dtypes.values()))
    )
    # The configuration is a static part of the tree.
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    placements = None if mesh is None else shardings(abstract, mesh)
    model = _read_weights(abstract, files, placements)
    return model, _load_tokenizer(folder)


def save_pretrained(
    model: Decoder,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: float = 5e9,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `transformers` loads: config, generation config, weights, tokenizer.

    Tensors are stored in `model.config.stored_dtype`. The folder appears whole or not at all; an
    older checkpoint in its place stays until the new one is on disk.

    Args:
        model: the decoder.
        tokenizer: a `transformers` tokenizer, or None to write none.
        folder: where; it must be new, empty or an older checkpoint.
        max_shard_bytes: largest safetensors file; more than that is split, with an index.
        generation: further entries of generation_config.json, such as the temperature.

    Raises:
        Refused: the folder holds something else.
        Failed: it could not be written (a full disk); nothing half-written is left.
    """
    config = model.config
    with _whole_folder(Path(folder)) as partial:
        write_json(partial / "config.json", config.to_hf_dict())
        hf_config = config.to_hf_dict()
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: hf_config[name] for name in names if hf_config[name] is not None}
        write_json(partial / "generation_config.json", ids | dict(generation or {}))
        write_tensors(partial, _checkpoint_tensors(model, config.stored_dtype), max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def save_value_head(head: ValueHead, folder: str | os.PathLike[str]) -> None:
    """Writes `value_head.safetensors` (float32) into an existing folder, whole or not at all."""
    path = Path(folder) / _VALUE_HEAD
    partial = path.with_name(f".{_VALUE_HEAD}.partial")
    tensors = {name: make() for name, _, make in _checkpoint_tensors(head, "float32")}
    try:
        save_tensors(tensors, partial)
        _sync(partial)
        partial.replace(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise Failed(f"cannot write {path}: {error}") from error


def load_value_head(folder: str | os.PathLike[str], embed_dim: int) -> ValueHead:
    """The value head that `save_value_head` wrote, for hidden states of width `embed_dim`."""
    path = Path(folder) / _VALUE_HEAD
    if not path.is_file():
        raise Refused(f"{path} is missing")
    files = TensorFiles([path])
    abstract = jax.eval_shape(lambda: ValueHead(embed_dim))
    _check_tensors(files, abstract, path)
    return _read_weights(abstract, files, None)


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise Refused(f"model path {path}: no such folder")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # the client has many kinds; all mean that there is no checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            f"model path {path}: neither a folder nor fetched from the hub ({reason})"
        ) from error


def _read_config(folder: Path) -> DecoderConfig:
    config = DecoderConfig.from_hf_dict(read_json(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        # Chat checkpoints often name the end of a turn only here.
        generation = read_json(folder / "generation_config.json")
        extra = token_ids(generation.get("eos_token_id"))
        config = replace(
            config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra)))
        )
    return config


def _check_tensors(files: TensorFiles, abstract: nnx.Module, where: Path) -> None:
    expected = {
        name: hf_shape(param) for _, param in named_weights(abstract) for name in hf_names(param)
    }
    for name, shape in expected.items():
        if name not in files.shapes:
            raise Refused(f"{where}: tensor {name} is missing; expected shape {list(shape)}")
        if files.shapes[name] != shape:
            raise Refused(
                f"{files.file(name)}: tensor {name} has shape {list(files.shapes[name])}; "
                f"config.json expects {list(shape)}"
            )
    for name in files.shapes:
        if name in expected or name.endswith("rotary_emb.inv_freq"):
            continue  # old Llama files carry the rotary constants, which follow from the config
        if name == "lm_head.weight" and _is_copy_of_embedding(files):
            continue
        raise Refused(f"{files.file(name)}: tensor {name} is not part of this architecture")


def _is_copy_of_embedding(files: TensorFiles) -> bool:
    """Some tied checkpoints store the output matrix as well; it must be the embedding."""
    embed = "model.embed_tokens.weight"
    return files.shapes["lm_head.weight"] == files.shapes.get(embed) and np.array_equal(
        files.read("lm_head.weight"), files.read(embed)
    )


def _widest(dtypes: set[str]) -> str:
    """One dtype that holds every stored value exactly."""
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _read_weights(abstract: nnx.Module, files: TensorFiles, placements: nnx.Module | None) -> Any:
    def read(param: nnx.Param, placement: nnx.Param | None) -> nnx.Param:
        host = np.empty(param.shape, np.float32)
        layers = host if is_stacked(param) else host[None]
        for layer, name in zip(layers, hf_names(param), strict=True):
            layer[...] = from_hf(param, files.read(name))
        where = None if placement is None else jax.tree.leaves(placement)[0]
        value = jnp.asarray(host) if where is None else jax.device_put(host, where)
        return jax.tree.map(lambda _: value, param)

    if placements is None:
        return jax.tree.map(lambda param: read(param, None), abstract, is_leaf=is_param)
    return jax.tree.map(read, abstract, placements, is_leaf=is_param)


def _checkpoint_tensors(model: nnx.Module, dtype: str) -> Iterator[tuple[str, int, Any]]:
    """(name, bytes, function that fetches it) of every tensor, layer by layer."""
    entries = []
    for order, (_, param) in enumerate(named_weights(model)):
        for layer, name in enumerate(hf_names(param)):
            entries.append((layer if is_stacked(param) else -1, order, name, param))
    width = jnp.dtype(dtype).itemsize

    def fetch(layer: int, param: nnx.Param) -> np.ndarray:
        value = param[...] if layer < 0 else param[...][layer]
        return np.ascontiguousarray(to_hf(param, np.asarray(value)).astype(jnp.dtype(dtype)))

    for layer, _, name, param in sorted(entries, key=lambda entry: entry[:2]):
        size = int(np.prod(hf_shape(param))) * width
        yield name, size, lambda layer=layer, param=param: fetch(layer, param)


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{folder}: the tokenizer does not load: {reason}") from error


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`, which it replaces only when it is complete and on disk."""
    folder = folder.expanduser().absolute()
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / "config.json").is_file():
        raise Refused(f"{folder} holds something other than a checkpoint; name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in files_below(partial):
            _sync(path)
        _sync(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        from safetensors import SafetensorError

        if isinstance(error, OSError | SafetensorError):
            raise Failed(f"cannot write checkpoint {folder}: {error}") from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
