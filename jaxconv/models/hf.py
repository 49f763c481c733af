"""Hugging Face checkpoints in and out: folders that `transformers` reads and writes."""

import functools
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from jaxconv import processes
from jaxconv.durable import publish, standing, whole_folder
from jaxconv.errors import Failed, Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ValueHead
from jaxconv.models.hf_config import MULTIMODAL, from_hf_dict, to_hf_dict, token_ids
from jaxconv.models.lora import AdaptedDecoder, merge
from jaxconv.models.safetensors_io import (
    Tensor,
    TensorFiles,
    make_tensors,
    open_checkpoint,
    read_json,
    save_tensors,
    write_json,
    write_tensors,
)
from jaxconv.models.sharding import for_host, shardings
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
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_COPIES = "consolidated*"  # Mistral's repositories hold the weights again, under names of their own


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
    folder = model_folder(path)
    config = _read_config(folder)
    files = open_checkpoint(folder)
    _leave_out_other_parts(files, folder)
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    check_tensors(files, abstract, folder)
    config = replace(
        config, dtype=dtype or "float32", stored_dtype=widest(set(files.dtypes.values()))
    )
    # The configuration is a static part of the tree.
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    placements = None if mesh is None else shardings(abstract, mesh)
    model = read_weights(abstract, files, placements)
    return model, load_tokenizer(folder)


def save_pretrained(
    model: Decoder | AdaptedDecoder,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: float = 5e9,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `transformers` loads: config, generation config, weights, tokenizer.

    Tensors are stored in `model.config.stored_dtype`. The folder appears whole or not at all; an
    older checkpoint in its place stays until the new one is on disk. Of several processes all call
    this: their devices give, tensor by tensor, what process 0 writes.

    Args:
        model: the decoder; an adapter is merged into it.
        tokenizer: a `transformers` tokenizer, or None to write none.
        folder: where; it must be new, empty or an older checkpoint.
        max_shard_bytes: largest safetensors file; more than that is split, with an index.
        generation: entries of generation_config.json, such as the temperature, beside the token
            ids of `model.config`; `generation_config` of the checkpoint that the model came from
            keeps all of its own.

    Raises:
        Refused: the folder holds something else.
        Failed: it could not be written (a full disk); nothing half-written is left.
    """
    config = model.config
    tensors = checkpoint_tensors(merge(model), config.stored_dtype)
    if processes.index() > 0:
        make_tensors(tensors)
        return processes.barrier("checkpoint")
    with whole_folder(Path(folder)) as partial:
        write_json(partial / "config.json", to_hf_dict(config))
        hf_config = to_hf_dict(config)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: hf_config[name] for name in names if hf_config[name] is not None}
        write_json(partial / "generation_config.json", ids | dict(generation or {}))
        write_tensors(partial, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    processes.barrier("checkpoint")


def generation_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The generation_config.json of a folder or hub id: how it is meant to be sampled from.

    Empty when there is none. Raises Refused for a path that holds no checkpoint.
    """
    file = model_folder(path) / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def save_value_head(head: ValueHead, folder: str | os.PathLike[str]) -> None:
    """Writes `value_head.safetensors` (float32) into an existing folder, whole or not at all."""
    path = Path(folder) / _VALUE_HEAD
    if processes.index() > 0:
        make_tensors(checkpoint_tensors(head, "float32"))
        return processes.barrier("value head")
    partial = path.with_name(f".{_VALUE_HEAD}.partial")
    try:
        save_tensors(checkpoint_tensors(head, "float32"), partial)
        publish(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise Failed(f"cannot write {path}: {error}") from error
    processes.barrier("value head")


def load_value_head(folder: str | os.PathLike[str], embed_dim: int) -> ValueHead:
    """The value head that `save_value_head` wrote, for hidden states of width `embed_dim`."""
    path = Path(folder) / _VALUE_HEAD
    if not path.is_file():
        raise Refused(f"{path} is missing")
    files = TensorFiles([path])
    abstract = jax.eval_shape(lambda: ValueHead(embed_dim))
    check_tensors(files, abstract, path)
    return read_weights(abstract, files, None)


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder at a path, or that of a hub id once it is fetched; Refused where there is none."""
    folder = standing(Path(path).expanduser())
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise Refused(f"model path {path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=[*_FILES], ignore_patterns=[_COPIES])
        )
    except Exception as error:  # the client has many kinds; all mean that there is no checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            f"model path {path}: neither a folder nor fetched from the hub ({reason})"
        ) from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a folder that a model, its tokenizer or its chat template may depend on."""
    found = {file for pattern in _FILES for file in folder.glob(pattern)}
    return sorted(found - set(folder.glob(_COPIES)))


def _read_config(folder: Path) -> DecoderConfig:
    config = from_hf_dict(read_json(folder / "config.json"))
    # Chat checkpoints often name the end of a turn only here.
    extra = token_ids(generation_config(folder).get("eos_token_id"))
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def check_tensors(
    files: TensorFiles, abstract: nnx.Module, where: Path, source: str = "config.json"
) -> None:
    """Raises Refused for the first tensor that `abstract`, built as `source` says, contradicts."""
    expected = {
        name: hf_shape(param) for _, param in named_weights(abstract) for name in hf_names(param)
    }
    for name, shape in expected.items():
        if name not in files.shapes:
            raise Refused(f"{where}: tensor {name} is missing; expected shape {list(shape)}")
        if files.shapes[name] != shape:
            raise Refused(
                f"{files.file(name)}: tensor {name} has shape {list(files.shapes[name])}; "
                f"{source} expects {list(shape)}"
            )
    for name in files.shapes:
        if name in expected or name.endswith("rotary_emb.inv_freq"):
            continue  # old Llama files carry the rotary constants, which follow from the config
        if name == "lm_head.weight" and _is_copy_of_embedding(files):
            continue
        raise Refused(f"{files.file(name)}: tensor {name} is not part of this architecture")


def _leave_out_other_parts(files: TensorFiles, folder: Path) -> None:
    """Gives the text part of an image and text model the names it has by itself."""
    if read_json(folder / "config.json")["model_type"] not in MULTIMODAL:
        return
    others = ("vision_tower.", "multi_modal_projector.")
    left_out = sum(name.startswith(others) for name in files.shapes)
    logging.getLogger(__name__).warning(
        "%s: loading the text part only; %d tensors of %s are left out, and an export has none",
        folder,
        left_out,
        " and ".join(other.rstrip(".") for other in others),
    )
    files.rename(
        lambda name: None if name.startswith(others) else name.removeprefix("language_model.")
    )


def _is_copy_of_embedding(files: TensorFiles) -> bool:
    """Some tied checkpoints store the output matrix as well; it must be the embedding."""
    embed = "model.embed_tokens.weight"
    return files.shapes["lm_head.weight"] == files.shapes.get(embed) and np.array_equal(
        files.read("lm_head.weight"), files.read(embed)
    )


def widest(dtypes: set[str]) -> str:
    """One dtype that holds every stored value exactly."""
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def read_weights(abstract: nnx.Module, files: TensorFiles, placements: nnx.Module | None) -> Any:
    """A module like `abstract` with float32 weights from `files`, placed as `placements` says."""

    def read(param: nnx.Param, placement: nnx.Param | None) -> nnx.Param:
        if placement is None:
            (host,) = _read_parts(param, files, [()])
            value = jax.device_put(host)
        else:
            (where,) = jax.tree.leaves(placement)
            value = _read_split(param, files, where)
        return jax.tree.map(lambda _: value, param)

    if placements is None:
        return jax.tree.map(lambda param: read(param, None), abstract, is_leaf=is_param)
    return jax.tree.map(read, abstract, placements, is_leaf=is_param)


def _read_split(param: nnx.Param, files: TensorFiles, where: Sharding) -> jax.Array:
    """One weight, of which the host holds what goes to devices of this process."""
    places = where.addressable_devices_indices_map(param.shape)
    # A slice has no hash before Python 3.12.
    wanted = {str(index): index for index in places.values()}
    parts = dict(zip(wanted, _read_parts(param, files, list(wanted.values())), strict=True))
    arrays = [jax.device_put(parts[str(index)], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(param.shape, where, arrays)


def _read_parts(
    param: nnx.Param, files: TensorFiles, parts: Sequence[tuple[slice, ...]]
) -> list[np.ndarray]:
    """What lies at each of these indices of a weight, float32; every tensor is read once."""
    like = np.broadcast_to(np.float32(0), param.shape)
    hosts = [_aligned(like[part].shape) for part in parts]
    for at, name in enumerate(hf_names(param)):
        tensor = from_hf(param, files.read(name))
        for host, part in zip(hosts, parts, strict=True):
            # Layers, the first axis of a stack, are never split.
            layer, within = (host[at], part[1:]) if is_stacked(param) else (host, part)
            layer[...] = tensor[within]
    return hosts


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 memory that a CPU device takes over as it is rather than copies."""
    boundary = 64  # bytes; jax's own allocations begin at such addresses
    raw = np.empty(4 * math.prod(shape) + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)


def checkpoint_tensors(model: nnx.Module, dtype: str) -> Iterator[Tensor]:
    """Every tensor of a module as a checkpoint in `dtype` holds it, layer by layer."""
    entries = []
    for order, (_, param) in enumerate(named_weights(model)):
        for layer, name in enumerate(hf_names(param)):
            entries.append((layer if is_stacked(param) else -1, order, name, param))

    def fetch(layer: int, param: nnx.Param) -> np.ndarray:
        value = param[...] if layer < 0 else param[...][layer]
        return to_hf(param, np.asarray(for_host(value)))

    for layer, _, name, param in sorted(entries, key=lambda entry: entry[:2]):
        make = functools.partial(fetch, layer, param)
        yield Tensor(name, hf_shape(param), dtype, make)


def load_tokenizer(folder: Path) -> Any:
    """The `transformers` tokenizer of a folder, None where it holds none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{folder}: the tokenizer does not load: {reason}") from error
