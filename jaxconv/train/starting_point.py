"""Models from a config: a checkpoint or a small one from scratch, saved and loaded."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxconv import processes
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.durable import publish
from jaxconv.errors import Refused
from jaxconv.models import hf
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.hf_config import from_hf_dict
from jaxconv.models.known import KNOWN, refuse_another
from jaxconv.models.sharding import loosened
from jaxconv.train.mesh import replicate, split_mesh

UNROLLED_LAYERS = 4  # models of up to so many layers run them as straight-line code


def starting_model(
    config, folder: Path, words: Callable[[], Iterable[str]]
) -> tuple[ActorCritic, object]:
    """An actor-critic on `starting_decoder`, and its tokenizer."""
    decoder, tokenizer = starting_decoder(config, folder, words, config.rollout.lengths[-1])
    return _with_head(decoder, ValueHead(decoder.config.embed_dim)), tokenizer


def starting_decoder(
    config, folder: Path, words: Callable[[], Iterable[str]], positions: int
) -> tuple[Decoder, object]:
    """The checkpoint at `config.model.path`, or a small model with a tokenizer of its own.

    Args:
        config: `model` and `seed`.
        folder: where the tokenizer of a small model is kept.
        words: texts to train that tokenizer on.
        positions: tokens that a stream of a small model may have.
    """
    if config.model.path:
        decoder, tokenizer = load_decoder(config.model.path, config)
        if tokenizer is None:
            raise Refused(f"config.model.path={config.model.path!r} has no tokenizer")
        return with_pad_token(decoder, tokenizer, config), tokenizer
    tokenizer = small_tokenizer(folder, words, config.model.vocab_size)
    architecture = dataclasses.replace(
        small_decoder(config, positions),
        vocab_size=len(tokenizer),
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    return jax.jit(Decoder, static_argnums=0)(architecture, jax.random.key(config.seed)), tokenizer


def with_pad_token(decoder: Decoder, tokenizer, config) -> Decoder:
    """The decoder with the tokenizer's pad token, which an export needs to generate in batches.

    Where the tokenizer has none it gets `config.model.pad_token`.

    Raises:
        Refused: neither names one, or the config names a token that is not in the vocabulary.
    """
    name = config.model.pad_token
    if name and name not in tokenizer.get_vocab():
        raise Refused(f"config.model.pad_token={name!r}; it must be a token of the tokenizer")
    if name:
        tokenizer.pad_token = name
    if tokenizer.pad_token_id is None:
        raise Refused(
            f"the tokenizer of config.model.path={config.model.path!r} has no pad token; name one "
            f"of its tokens in config.model.pad_token, such as {tokenizer.eos_token!r}"
        )
    return run_as(decoder, dataclasses.replace(decoder.config, pad_token_id=tokenizer.pad_token_id))


def small_decoder(config, positions: int) -> DecoderConfig:
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
        max_positions=positions,
        tie_embeddings=True,
        attention_bias=m.family == "qwen2",
        qk_norm=m.family == "qwen3",
        dtype=m.dtype,
        remat=m.remat,
        kernels=m.kernels,
        unroll_layers=m.num_layers <= UNROLLED_LAYERS,
    )


def architecture(config, positions: int) -> DecoderConfig:
    """The decoder that a run of this config would train, without weights or tokenizer.

    Of a checkpoint it is read off its folder, or known by its hub id; of a small model the
    vocabulary is the largest that its tokenizer may have.

    Raises:
        Refused: a hub id whose architecture is not known here.
    """
    path = config.model.path
    if not path:
        return small_decoder(config, positions)
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        found = from_hf_dict(json.loads((folder / "config.json").read_text()))
    elif path in KNOWN:
        found = KNOWN[path]
    else:
        raise Refused(
            f"config.model.path={path!r}; without weights it may be a folder with a config.json, "
            f"or one of {', '.join(KNOWN)}"
        )
    return executed(dataclasses.replace(found, dtype=config.model.dtype), config)


def executed(decoder: DecoderConfig, config) -> DecoderConfig:
    """A checkpoint's decoder with the config's choices of how it runs."""
    return dataclasses.replace(
        decoder,
        remat=config.model.remat,
        kernels=config.model.kernels,
        unroll_layers=decoder.num_layers <= UNROLLED_LAYERS,
    )


def small_tokenizer(folder: Path, words: Callable[[], Iterable[str]], vocab_size: int):
    """The tokenizer in `folder`; a BPE of these words is put there first if it is not."""
    import transformers

    with processes.process_0_first("the tokenizer"):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            train_tokenizer(words(), vocab_size).save_pretrained(partial)
            publish(partial, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def save(
    model: ActorCritic, tokenizer, folder: Path, generation: Mapping[str, Any] | None = None
) -> None:
    """Writes a checkpoint and its value head; `generation` goes to generation_config.json."""
    hf.save_pretrained(model.decoder, tokenizer, folder, generation=generation)
    hf.save_value_head(model.value_head, folder)


def is_saved(folder: Path) -> bool:
    """The value head is written last; to a bucket, config.json is sent last."""
    return all((folder / name).is_file() for name in ("value_head.safetensors", "config.json"))


def stored_bytes(model: Decoder) -> int:
    """What the weights take in a checkpoint."""
    size = jnp.dtype(model.config.stored_dtype).itemsize
    return size * sum(leaf.size for leaf in jax.tree.leaves(model))


def load(folder: Path, config, decoder: DecoderConfig | None = None) -> ActorCritic:
    """What `save` wrote, run as `decoder` says if it is given."""
    model, _ = load_decoder(folder, config)
    model = model if decoder is None else run_as(model, decoder)
    return _with_head(model, hf.load_value_head(folder, model.config.embed_dim))


def _with_head(decoder: Decoder, head: ValueHead) -> ActorCritic:
    """The two on the same devices."""
    where = jax.tree.leaves(decoder)[0].sharding
    if isinstance(where, NamedSharding):
        head = replicate(head, where.mesh)
    return ActorCritic(decoder, head)


def load_decoder(path: str | Path, config) -> tuple[Decoder, object]:
    """A checkpoint's decoder, executed as the config says, and its tokenizer.

    Where the config splits models, no device gets more than its part of the weights.
    """
    model, tokenizer = hf.load_pretrained(path, dtype=config.model.dtype, mesh=split_mesh(config))
    model = loosened(model)
    refuse_another(str(path), model.config)
    return run_as(model, executed(model.config, config)), tokenizer


def run_as(model: Decoder, decoder: DecoderConfig) -> Decoder:
    """The same weights under a configuration that differs in how they are executed or stored."""
    like = jax.eval_shape(lambda: Decoder(decoder, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def as_stored(model: ActorCritic) -> ActorCritic:
    """The model with its weights rounded to what a checkpoint of it holds."""
    dtype = model.decoder.config.stored_dtype
    decoder = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.decoder)
    return ActorCritic(decoder, model.value_head)
