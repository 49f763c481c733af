"""Folders of sentence-transformers, in and out.

`modules.json` lists the parts: the encoder, pooling, and Normalize where embeddings have unit
length. Files are written in the form that every version of sentence-transformers reads.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxconv.durable import whole_folder
from jaxconv.errors import Refused
from jaxconv.models.encoder_io import load_encoder, write_encoder
from jaxconv.models.hf import load_tokenizer, model_folder
from jaxconv.models.pooling import POOLINGS
from jaxconv.models.safetensors_io import read_json, write_json
from jaxconv.models.sentence_encoder import SentenceEncoder

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SETTINGS = "config_sentence_transformers.json"
_TRANSFORMER = "sentence_bert_config.json"


def load_sentence_encoder(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    dim: int | None = None,
    max_length: int | None = None,
) -> SentenceEncoder:
    """The sentence encoder of a folder or hub id.

    A folder without `modules.json` is an encoder alone; its embeddings are the mean of its tokens,
    of no fixed length, as sentence-transformers makes them.

    Args:
        path: of sentence-transformers, or of `transformers`.
        dtype: compute dtype, "float32" (the default) or "bfloat16".
        dim: numbers to keep of an embedding (Matryoshka); None keeps all.
        max_length: tokens to read of a text; None: what the folder says.

    Raises:
        Refused: the path, a part that is not computed here, or what `load_encoder` refuses.
    """
    folder = model_folder(path)
    kinds = _modules(folder)
    encoder_folder = folder / kinds.get("Transformer", "")
    encoder = load_encoder(encoder_folder, dtype=dtype)
    tokenizer = load_tokenizer(encoder_folder)
    if tokenizer is None:
        raise Refused(f"{encoder_folder} holds no tokenizer; a sentence encoder needs one")
    settings = _optional(folder / _SETTINGS)
    transformer = _optional(encoder_folder / _TRANSFORMER)
    longest = min(int(tokenizer.model_max_length), encoder.config.longest)
    return SentenceEncoder(
        encoder,
        tokenizer,
        max_length=max_length or min(transformer.get("max_seq_length") or longest, longest),
        pooling=_pooling(folder / kinds["Pooling"]) if "Pooling" in kinds else "mean",
        normalize="Normalize" in kinds,
        dim=dim,
        prompts=settings.get("prompts") or {},
        default_prompt=settings.get("default_prompt_name"),
        lower_case=bool(transformer.get("do_lower_case")),
    )


def save_sentence_encoder(sentences: SentenceEncoder, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that sentence-transformers, `transformers` and `load_sentence_encoder` load.

    The Matryoshka cut is not in it: it is asked for when a folder is loaded. The folder appears
    whole or not at all; an older one in its place stays until the new one is on disk.

    Raises:
        Refused: the folder holds something else.
        Failed: it could not be written (a full disk); nothing half-written is left.
    """
    modules = ["Transformer", "Pooling", *(["Normalize"] if sentences.normalize else [])]
    with whole_folder(Path(folder)) as partial:
        write_encoder(sentences.encoder, partial)
        sentences.tokenizer.save_pretrained(partial)
        entries = []
        for i, kind in enumerate(modules):
            path = "" if i == 0 else f"{i}_{kind}"
            (partial / path).mkdir(exist_ok=True)
            entries.append(
                {
                    "idx": i,
                    "name": str(i),
                    "path": path,
                    "type": f"sentence_transformers.models.{kind}",
                }
            )
        write_json(partial / "modules.json", entries)
        flags = {flag: mode == sentences.pooling for flag, mode in _FLAGS.items()}
        dim = sentences.encoder.config.embed_dim
        write_json(
            partial / "1_Pooling" / "config.json",
            {"word_embedding_dimension": dim, **flags, "include_prompt": True},
        )
        write_json(
            partial / _TRANSFORMER,
            {"max_seq_length": sentences.max_length, "do_lower_case": sentences.lower_case},
        )
        write_json(
            partial / _SETTINGS,
            {
                "prompts": dict(sentences.prompts),
                "default_prompt_name": sentences.default_prompt,
                "similarity_fn_name": "cosine",
            },
        )


def _modules(folder: Path) -> dict[str, str]:
    """Kind of each part to its folder."""
    file = folder / "modules.json"
    if not file.is_file():
        return {}
    entries = read_json(file, list)
    kinds = [str(entry["type"]).rsplit(".", 1)[-1] for entry in entries]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise Refused(
            f"{file} lists {', '.join(kinds)}; supported: Transformer, Pooling, perhaps Normalize"
        )
    return {kind: entry["path"] for kind, entry in zip(kinds, entries, strict=True)}


def _pooling(folder: Path) -> str:
    file = folder / "config.json"
    config = read_json(file)
    modes = config.get("pooling_mode") or [
        mode for flag, mode in _FLAGS.items() if config.get(flag)
    ]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise Refused(
            f"{file}: pooling is {' and '.join(modes)}; supported: one of {', '.join(POOLINGS)}"
        )
    if not config.get("include_prompt", True):
        raise Refused(f"{file}: include_prompt is False; supported: True")
    return modes[0]


def _optional(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}
