"""Encoders in and out: Hugging Face folders that `transformers` reads and writes."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import jax

from jaxconv.models.encoder import Encoder
from jaxconv.models.encoder_config import encoder_from_hf, encoder_to_hf
from jaxconv.models.hf import (
    check_tensors,
    checkpoint_tensors,
    model_folder,
    read_weights,
    widest,
)
from jaxconv.models.safetensors_io import (
    TensorFiles,
    open_checkpoint,
    read_json,
    write_json,
    write_tensors,
)

_BASES = ("bert.", "roberta.", "mpnet.")  # what models with a head put before an encoder's names
_HEADS = ("pooler.", "cls.", "lm_head.", "classifier.", "qa_outputs.")
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}


def load_encoder(path: str | os.PathLike[str], *, dtype: str | None = None) -> Encoder:
    """The encoder of a folder or hub id, with float32 weights on the default device.

    Heads that are no part of the encoder (the pooler of `transformers`, a language model's head)
    are left out, with a line that says so.

    Args:
        path: with `config.json` and safetensors weights.
        dtype: compute dtype, "float32" (the default) or "bfloat16".

    Raises:
        Refused: the path, an unsupported architecture, or the first tensor that is missing,
            unexpected, of another shape or in a damaged file.
    """
    folder = model_folder(path)
    config = encoder_from_hf(read_json(folder / "config.json"))
    files = open_checkpoint(folder, leave_out=lambda name: name.endswith("position_ids"))
    _leave_out_heads(files, folder)
    config = replace(
        config, dtype=dtype or "float32", stored_dtype=widest(set(files.dtypes.values()))
    )
    abstract = jax.eval_shape(lambda: Encoder(config, jax.random.key(0)))
    check_tensors(files, abstract, folder)
    return read_weights(abstract, files, None)


def write_encoder(encoder: Encoder, folder: Path) -> None:
    """Writes config and weights into an existing folder that `transformers.AutoModel` loads."""
    write_json(folder / "config.json", encoder_to_hf(encoder.config))
    tensors = checkpoint_tensors(encoder, encoder.config.stored_dtype)
    write_tensors(folder, tensors, max_shard_bytes=5e9)


def _leave_out_heads(files: TensorFiles, folder: Path) -> None:
    left_out = set()

    def name_of(name: str) -> str | None:
        for base in _BASES:
            name = name.removeprefix(base)
        if name.startswith(_HEADS):
            left_out.add(name.split(".")[0])
            return None
        for old, new in _OLD_NAMES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    files.rename(name_of)
    if left_out:
        logging.getLogger(__name__).info(
            "%s: loading the encoder only; %s is left out, and an export has none",
            folder,
            ", ".join(sorted(left_out)),
        )
