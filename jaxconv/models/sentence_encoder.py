"""Texts to embeddings: an encoder, its tokenizer, and how token vectors become one.

The folder that it is read from and written to is that of sentence-transformers.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxconv.data.text_rows import BATCH_TOKENS, Batch, TextRows, batches
from jaxconv.errors import Refused
from jaxconv.models.encoder import Encoder, EncoderBlock, attention
from jaxconv.models.pooling import POOLINGS, cut, pool
from jaxconv.models.text_attention import text_attention
from jaxconv.models.weights import named_weights

_CHUNK = 8192  # texts that are tokenised and laid out together
_ACCELERATOR_BATCH = 8  # times as many tokens as suit the caches of a core


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """Attributes:
    encoder: the weights.
    tokenizer: a `transformers` tokenizer.
    max_length: tokens that are read of a text; the rest is cut off.
    pooling: one of `pooling.POOLINGS`.
    normalize: whether embeddings have unit length.
    dim: how many of the first numbers are kept (Matryoshka); None keeps all.
    prompts: name to what is put before a text.
    default_prompt: name of the one that is put there where none is asked for; None for none.
    lower_case: whether texts are put into lower case before they are tokenised.
    """

    encoder: Encoder
    tokenizer: Any
    max_length: int
    pooling: str = "mean"
    normalize: bool = True
    dim: int | None = None
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False

    def __post_init__(self):
        config = self.encoder.config
        if self.pooling not in POOLINGS:
            raise Refused(f"pooling is {self.pooling!r}; it may be {', '.join(POOLINGS)}")
        if not 1 <= self.max_length <= config.longest:
            raise Refused(
                f"max_length is {self.max_length}; the encoder reads 1 to {config.longest} tokens"
            )
        if self.dim is not None and not 1 <= self.dim <= config.embed_dim:
            raise Refused(f"dim is {self.dim}; it may be 1 to {config.embed_dim}")
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            raise Refused(
                f"default_prompt is {self.default_prompt!r}; it may be {_names(self.prompts)}"
            )

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.dim or self.encoder.config.embed_dim

    @property
    def about(self) -> str:
        """One line for reports."""
        config = self.encoder.config
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.encoder))
        return (
            f"encoder: {config.family}, {parameters:,} parameters, {self.pooling} pooling, "
            f"width {self.width}, the first {self.max_length} tokens of a text"
        )

    def tokens(self, texts: Sequence[str], prompt: str | None = None) -> list[list[int]]:
        """Token ids of each text behind the prompt of that name, cut to `max_length`."""
        prompt = prompt or self.default_prompt
        if prompt is not None:
            if prompt not in self.prompts:
                raise Refused(f"prompt is {prompt!r}; it may be {_names(self.prompts)}")
            texts = [self.prompts[prompt] + text for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        return self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    def encode(self, texts: Sequence[str], *, prompt: str | None = None) -> np.ndarray:
        """Embeddings, float32 [texts, width].

        Every device of this process, and every core where cores are all there is, has a batch of
        its own under way. Shapes are compiled as they come up, one layer for each;
        `train.compile_cache` keeps them.

        Args:
            texts: any number of any length.
            prompt: name of what is put before each.
        """
        out = np.zeros((len(texts), self.width), np.float32)
        workers = self._workers
        streams = workers[0].streams
        size = BATCH_TOKENS if streams else _ACCELERATOR_BATCH * BATCH_TOKENS
        pending: list[tuple[np.ndarray, Future]] = []

        def collect() -> None:
            for records, found in pending:
                out[records] = found.result()[: len(records)]
            pending.clear()

        with contextlib.ExitStack() as stack:
            threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in workers]
            turn = itertools.cycle(range(len(workers)))
            for begin in range(0, len(texts), _CHUNK):
                ids = self.tokens(texts[begin : begin + _CHUNK], prompt)
                collect()  # of the chunk before, which was at work meanwhile
                rows = batches(ids, longest=self.max_length, batch_tokens=size, streams=streams)
                for batch in rows:
                    i = next(turn)
                    found = threads[i].submit(workers[i], batch)
                    pending.append((begin + batch.records, found))
            collect()
        return out

    @functools.cached_property
    def _workers(self) -> list["_Worker"]:
        workers = [_Worker(self, device) for device in jax.local_devices()]
        if not workers[0].streams:
            return workers
        # Loops over texts leave one core to each; a device may be several cores.
        cores = len(os.sched_getaffinity(0))
        return workers * max(cores // len(workers), 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that embeddings depend on: weights, tokenizer and settings."""
        digest = hashlib.sha256()
        for name, param in named_weights(self.encoder):
            digest.update(name.encode())
            digest.update(np.asarray(param[...]))
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # These two are the state of its latest call.
        tokenizer |= {"truncation": None, "padding": None}
        digest.update(json.dumps(tokenizer, sort_keys=True).encode())
        settings = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("encoder", "tokenizer")
        }
        config = dataclasses.asdict(self.encoder.config)
        described = settings | {"prompts": dict(self.prompts), "config": config}
        digest.update(json.dumps(described, sort_keys=True).encode())
        return digest.hexdigest()


class _Worker:
    """A copy of the weights on one device, layer by layer, and what runs them there."""

    def __init__(self, sentences: SentenceEncoder, device: jax.Device):
        encoder = jax.device_put(sentences.encoder, device)
        # Apart, so that a layer reads its weights where they lie and is compiled once for all.
        self._layers = [
            jax.tree.map(lambda w, i=i: w[i], encoder.layers)
            for i in range(encoder.config.num_layers)
        ]
        del encoder.layers
        self._encoder, self._device = encoder, device
        self._finish = functools.partial(
            _finish,
            pooling=sentences.pooling,
            dim=sentences.dim,
            normalize=sentences.normalize,
        )

    @property
    def streams(self) -> bool:
        """Whether texts go end to end: loops over texts suit a CPU alone."""
        return self._device.platform == "cpu"

    def __call__(self, batch: Batch) -> np.ndarray:
        """float32 [P, width]."""
        rows = jax.device_put(batch.rows, self._device)
        x_RWD, bias_HTT = _begin(self._encoder, rows, is_stream=batch.is_stream)
        for block in self._layers:
            x_RWD = _layer(block, x_RWD, rows, bias_HTT, is_stream=batch.is_stream)
        return np.asarray(self._finish(x_RWD, rows))


@functools.partial(jax.jit, static_argnames="is_stream")
def _begin(encoder: Encoder, rows: TextRows, *, is_stream: bool):
    """(what the first layer reads, relative positions)."""
    tokens = rows.tokens.shape[1]
    length = min(encoder.config.longest, tokens) if is_stream else tokens
    return encoder.embedded(rows.tokens, rows.positions), encoder.relative_bias(length)


@functools.partial(jax.jit, static_argnames="is_stream", donate_argnums=1)
def _layer(block: EncoderBlock, x_RWD, rows: TextRows, bias_HTT, *, is_stream: bool):
    def attend(q, k, v):
        if not is_stream:
            return attention(q, k, v, rows.segment_ids, bias_HTT)
        found = text_attention(
            q[0], k[0], v[0], rows.first, rows.length, bias_HTT, longest=block.config.longest
        )
        return found[None]

    return block(x_RWD, attend)


@functools.partial(jax.jit, static_argnames=("pooling", "dim", "normalize"))
def _finish(x_RWD, rows: TextRows, *, pooling: str, dim: int | None, normalize: bool):
    return cut(pool(x_RWD, rows, pooling), dim, normalize=normalize)


def _names(known: Mapping[str, str]) -> str:
    return ", ".join(map(repr, known)) or "none: the folder has no prompts"
