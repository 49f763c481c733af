"""Architectures by the hub id of their checkpoints, for what needs shapes and no weights.

The numbers are those of each checkpoint's public `config.json`. A run reads that file itself;
`refuse_another` holds the two against each other.
"""

import dataclasses

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig, RopeScaling

_QWEN = {
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_ids": (151645,),
    "stored_dtype": "bfloat16",
}
_LLAMA_31 = {
    "family": "llama",
    "vocab_size": 128256,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 131072,
    "rope_theta": 5e5,
    "rope_scaling": RopeScaling("llama3", 8.0, 8192),
    "norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128008, 128009),
    "stored_dtype": "bfloat16",
}
KNOWN = {
    "Qwen/Qwen2.5-0.5B-Instruct": DecoderConfig(
        family="qwen2",
        vocab_size=151936,
        embed_dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=4864,
        max_positions=32768,
        tie_embeddings=True,
        attention_bias=True,
        **_QWEN,
    ),
    "Qwen/Qwen2.5-7B-Instruct": DecoderConfig(
        family="qwen2",
        vocab_size=152064,
        embed_dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_dim=18944,
        max_positions=32768,
        attention_bias=True,
        **_QWEN,
    ),
    "Qwen/Qwen3-4B": DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        embed_dim=2560,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=9728,
        max_positions=40960,
        tie_embeddings=True,
        qk_norm=True,
        **_QWEN,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": DecoderConfig(
        embed_dim=4096, num_layers=32, num_heads=32, mlp_dim=14336, **_LLAMA_31
    ),
    "meta-llama/Llama-3.1-70B-Instruct": DecoderConfig(
        embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28672, **_LLAMA_31
    ),
}

# What a function of the weights does not depend on: special tokens and how it is executed.
_FREE = (
    "bos_token_id",
    "eos_token_ids",
    "pad_token_id",
    "dtype",
    "stored_dtype",
    "remat",
    "unroll_layers",
    "kernels",
)


def refuse_another(path: str, found: DecoderConfig) -> None:
    """Refuses a checkpoint `found` at a known hub id if it has another architecture than this one.

    Plans that were made for the known one would be wrong for it.
    """
    if path not in KNOWN:
        return
    for field in dataclasses.fields(DecoderConfig):
        expected, value = getattr(KNOWN[path], field.name), getattr(found, field.name)
        if field.name not in _FREE and expected != value:
            raise Refused(
                f"config.model.path={path!r}: its config.json says {field.name}={value}; "
                f"it must be {expected}"
            )
