"""Actor-critics from a config: a checkpoint or a small model from scratch, saved and loaded."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused
from jaxconv.models import hf
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead

UNROLLED_LAYERS = 4  # models of up to so many layers run them as straight-line code


def starting_model(
    config, folder: Path, words: Callable[[], Iterable[str]]
) -> tuple[ActorCritic, object]:
    """The checkpoint at `config.model.path`, or a small model with a tokenizer of its own.

    Args:
        config: `model`, `seed`, and `rollout.lengths` for the positions of a small model.
        folder: where the tokenizer of a small model is kept.
        words: texts to train that tokenizer on.
    """
    if config.model.path:
        decoder, tokenizer = load_decoder(config.model.path, config)
        if tokenizer is None:
            raise Refused(f"config.model.path={config.model.path!r} has no tokenizer")
        return ActorCritic(decoder, ValueHead(decoder.config.embed_dim)), tokenizer
    tokenizer = small_tokenizer(folder, words, config.model.vocab_size)
    decoder = dataclasses.replace(
        small_decoder(config),
        vocab_size=len(tokenizer),
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    model = jax.jit(Decoder, static_argnums=0)(decoder, jax.random.key(config.seed))
    return ActorCritic(model, ValueHead(decoder.embed_dim)), tokenizer


def small_decoder(config) -> DecoderConfig:
    """The architecture of a small model from scratch, before its tokenizer is known."""
    m = config.model
    return DecoderConfig(
        family=m.family,
        vocab_size=m.vocab_size,
        embed_dim=m.embed_dim,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.embed_dim // m.num_heads,
        mlp_dim=m.mlp_dim,
        max_positions=config.rollout.lengths[-1],
        tie_embeddings=True,
        attention_bias=m.family == "qwen2",
        qk_norm=m.family == "qwen3",
        dtype=m.dtype,
        remat=m.remat,
        unroll_layers=m.num_layers <= UNROLLED_LAYERS,
    )


def small_tokenizer(folder: Path, words: Callable[[], Iterable[str]], vocab_size: int):
    """The tokenizer in `folder`; a BPE of these words is put there first if it is not."""
    import transformers

    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        train_tokenizer(words(), vocab_size).save_pretrained(partial)
        partial.rename(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def save(
    model: ActorCritic, tokenizer, folder: Path, generation: Mapping[str, Any] | None = None
) -> None:
    """Writes a checkpoint and its value head; `generation` goes to generation_config.json."""
    hf.save_pretrained(model.decoder, tokenizer, folder, generation=generation)
    hf.save_value_head(model.value_head, folder)


def is_saved(folder: Path) -> bool:
    """The value head is written last."""
    return (folder / "value_head.safetensors").is_file()


def load(folder: Path, config, decoder: DecoderConfig | None = None) -> ActorCritic:
    """What `save` wrote, run as `decoder` says if it is given."""
    model, _ = load_decoder(folder, config)
    model = model if decoder is None else run_as(model, decoder)
    return ActorCritic(model, hf.load_value_head(folder, model.config.embed_dim))


def load_decoder(path: str | Path, config) -> tuple[Decoder, object]:
    """A checkpoint's decoder, executed as the config says, and its tokenizer."""
    model, tokenizer = hf.load_pretrained(path, dtype=config.model.dtype)
    decoder = dataclasses.replace(
        model.config,
        remat=config.model.remat,
        unroll_layers=model.config.num_layers <= UNROLLED_LAYERS,
    )
    return run_as(model, decoder), tokenizer


def run_as(model: Decoder, decoder: DecoderConfig) -> Decoder:
    """The same weights under a configuration that differs in how they are executed or stored."""
    like = jax.eval_shape(lambda: Decoder(decoder, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def as_stored(model: ActorCritic) -> ActorCritic:
    """The model with its weights rounded to what a checkpoint of it holds."""
    dtype = model.decoder.config.stored_dtype
    decoder = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.decoder)
    return ActorCritic(decoder, model.value_head)
