"""What `train_vs_peers.py` compares: small Llamas, their text, and the examples of each update."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxconv.data import token_store
from jaxconv.data.examples import TokenExample
from jaxconv.data.plan import Placement, plan
from jaxconv.data.stores import Stores
from jaxconv.data.synthetic import assistant
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.models.config import DecoderConfig

ROWS, PACKED_WIDTH = 8, 256  # at most of a micro-batch, at least of a row; as in configs/sft.py
LONGEST = 256  # tokens of a stream
MEDIAN, SIGMA = 64, 0.8  # of long-tailed lengths, tokens; sigma is that of HH-RLHF's dialogues
REPLY = 0.3  # of a long-tailed stream that is learned


def llama(vocab_size: int, width: int, layers: int, mlp: int) -> DecoderConfig:
    """Of four heads, with tied embeddings and unrolled layers, as `starting_point` makes them."""
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        mlp_dim=mlp,
        max_positions=2 * LONGEST,
        tie_embeddings=True,
        unroll_layers=True,
        stored_dtype="float32",
    )


SMALL = llama(640, 64, 2, 192)  # the embedded default
LARGER = llama(4096, 256, 4, 768)


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides do.

    Attributes:
        model, data: names for the table.
        method: "sft" or "dpo".
        config: of the model.
        store: folder of the tokenised examples.
        examples: of an update; of a packed one on average.
        updates: of a round; their examples are the same in every round.
    """

    model: str
    data: str
    method: str
    config: DecoderConfig
    store: Path
    examples: int
    updates: int

    def placements(self, pack: bool) -> list[Placement]:
        """Of the updates of a round: which examples each takes, and where ours puts them."""
        lengths = token_store.load(self.store).lengths
        width = up(lengths.max(), 16)
        if pack:
            width = max(width, PACKED_WIDTH)
        # An even number, for two cores.
        packed_rows = max(2, 2 * round(self.examples * lengths.mean() / width / 2))
        rows = packed_rows if pack else self.examples
        return plan(lengths, rows=rows, width=width, seed=0, steps=self.updates, pack=pack)


def up(x: int, multiple: int) -> int:
    return -(-int(x) // multiple) * multiple


# ---------------------------------------------------------------- examples


def help_desk(folder: Path, conversations: int) -> tuple[Path, Path]:
    """Stores of the embedded help desk: conversations, and pairs."""
    talks = assistant.conversations(0, conversations)
    pairs = assistant.pairs(conversations, conversations // 2, traits=("name",))
    words = (message.content for talk in talks for message in talk.messages)
    template = take_apart(train_tokenizer(words, SMALL.vocab_size), needs_system=False)
    stores = Stores(folder, template, max_length=2 * LONGEST, policy="refuse")
    stores.conversations("talks", talks)
    stores.pairs("pairs", pairs)
    return folder / "talks", folder / "pairs"


def long_tailed(folder: Path, vocab_size: int, examples: int) -> tuple[Path, Path]:
    """Stores of drawn tokens whose lengths are log-normal up to `LONGEST`: streams, and pairs."""
    rng = np.random.default_rng(0)

    def lengths(n: int) -> np.ndarray:
        return np.clip(rng.lognormal(math.log(MEDIAN), SIGMA, n), 8, LONGEST).astype(int)

    def stream(prompt: np.ndarray, reply: int) -> TokenExample:
        said = rng.integers(4, vocab_size, reply)
        return TokenExample(np.append(prompt, said), np.arange(len(prompt) + reply) >= len(prompt))

    def streams(of: int) -> Iterator[tuple[int, Sequence[TokenExample]]]:
        for i, longer in enumerate(lengths(examples)):
            reply = max(2, int(REPLY * longer))
            prompt = rng.integers(4, vocab_size, longer - reply)
            replies = [reply, rng.integers(1, reply)][:of]
            yield i, [stream(prompt, n) for n in replies]

    token_store.build(folder / "streams", streams(1), {}, streams=1)
    token_store.build(folder / "pairs", streams(2), {}, streams=2)
    return folder / "streams", folder / "pairs"


def cases(folder: Path) -> Iterator[Case]:
    """What is compared; the examples are made when they are needed."""
    for model, config, data, make, updates in (
        ("small", SMALL, "help desk", help_desk, 20),
        ("small", SMALL, "long-tailed", long_tailed, 20),
        ("larger", LARGER, "long-tailed", long_tailed, 6),
    ):
        place = folder / f"{model} {data}"
        place.mkdir()
        size = (1000,) if make is help_desk else (config.vocab_size, 500)
        for method, store in zip(("sft", "dpo"), make(place, *size), strict=True):
            yield Case(model, data, method, config, store, 16, updates)
