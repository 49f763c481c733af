"""What answers within a grammar take on the engine of the `local` backend.

    python benchmarks/llm_local.py [--rounds=5] [--slots=16] [--width=256] [--layers=4]

A random Llama with a vocabulary of 32,000 entries, whose tokenizer is trained here. Everything is
compiled first; rounds are interleaved and the table shows medians.

bursts    the plain path: turns of the same length in bursts of 32 tokens.
steps     the same tokens in the masked mode, one at a time: the host hands over a mask that allows
          everything and waits for each token.
grammar   answers in JSON, four times as many as there are slots, which are refilled. `masks` is the
          time in which the host finds out what the grammars allow, of a step.
no grammar  the same prompts and as many tokens for each on the plain path.
prefix    answers to prompts of which 512 tokens are the same, read once and read each time.

First the hashes of the programs of the plain path as StableHLO, which do not depend on the machine:
another version of this project with the same hashes has the same plain path.

Needs the extra `local`.
"""

import argparse
import hashlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxconv_kernels import pack_mask
from pydantic import BaseModel, Field

from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import DeviceGroup
from jaxconv.rollout.constrained import Constrained, Question
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.rollout.grammar import Grammars
from jaxconv.rollout.programs import lower
from jaxconv.train import compile_cache

VOCAB = 32_000
HEARD, SAID = 32, 96  # tokens of a prompt and of an answer
PREFIX = 512
ANSWERS = 64


class Verdict(BaseModel):
    """An answer as a judge gives it: a reason first, then what was asked."""

    reason: str = Field(max_length=60)
    aspects: list[Literal["factual", "style", "length", "tone"]] = Field(max_length=3)
    score: int = Field(ge=1, le=10)
    winner: Literal["first", "second", "tie"]


def make_tokenizer():
    """A byte-level BPE of 32,000 entries, of words that nobody has ever said."""
    rng = random.Random(0)
    parts = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 4))) for _ in range(600)]
    words = ["".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(60_000)]
    texts = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    fields = '{"reason": "it is", "aspects": ["factual", "style"], "score": 7, "winner": "first"}'
    return train_tokenizer([*texts, *[fields] * 50], VOCAB)


def plain_hashes(config: DecoderConfig, shape: EngineShape) -> dict[str, str]:
    """The first 12 hexadecimal digits of the SHA-256 of each program of the plain path."""
    programs = lower(config, shape, DeviceGroup((jax.local_devices()[0],)))
    return {
        name: hashlib.sha256(program.as_text().encode()).hexdigest()[:12]
        for name, program in programs.items()
    }


class TimedGrammars(Grammars):
    """Adds up the time in which masks are found."""

    seconds, calls = 0.0, 0

    def masks(self, writings, rows):
        began = time.perf_counter()
        found = super().masks(writings, rows)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return found


class Bench:
    """Engines with one set of weights; each method plays once and returns (seconds, tokens)."""

    def __init__(self, slots: int, width: int, layers: int):
        self.tokenizer = make_tokenizer()
        self.end = self.tokenizer.eos_token_id
        self.config = DecoderConfig(
            family="llama",
            vocab_size=VOCAB,
            embed_dim=width,
            num_layers=layers,
            num_heads=width // 64,
            num_kv_heads=width // 64,
            head_dim=64,
            mlp_dim=4 * width,
            max_positions=1024,
        )
        model = jax.jit(Decoder, static_argnums=0)(self.config, jax.random.key(0))
        self.weights = unstack(model)
        self.slots = slots
        self.allowed = np.asarray(pack_mask(jnp.ones((slots, VOCAB), bool)))
        self.short, self.long = self.shape(256), self.shape(1024)
        self.plain, self.stepped = self.engine(self.short), self.engine(self.short)
        self.writer_engine, self.long_engine = self.engine(self.short), self.engine(self.long)
        self.lengths = dict.fromkeys(range(ANSWERS), SAID)  # tokens of the answers, once known
        self.grammars = TimedGrammars(self.tokenizer, VOCAB, self.end)
        self.schema = Verdict.model_json_schema()

    def shape(self, length: int) -> EngineShape:
        return EngineShape(
            slots=self.slots,
            lengths=(length,),
            burst=32,
            leave=1.0,
            prefill_rows=(1, 8),
            prefill_tokens=(16, 64, 256),
        )

    def engine(self, shape: EngineShape) -> Engine:
        engine = Engine(
            self.config, shape, stop_ids=[VOCAB], key=jax.random.key(0), sampling=Sampling()
        )
        engine.weights = self.weights
        return engine

    def words(self, count: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(300, 30_000, count).tolist()

    def turns(self, engine: Engine, go_on: Callable[[], None]) -> tuple[float, int]:
        engine.reset()
        for slot in [engine.open(stream) for stream in range(self.slots)]:
            engine.say(slot, self.words(HEARD, slot), SAID)
        began = time.perf_counter()
        while engine.speaking:
            go_on()
            engine.collect()
        return time.perf_counter() - began, engine.sampled

    def bursts(self) -> tuple[float, int]:
        return self.turns(self.plain, self.plain.dispatch)

    def steps(self) -> tuple[float, int]:
        def go_on() -> None:
            self.stepped.read()
            self.stepped.choose(self.allowed, {})

        return self.turns(self.stepped, go_on)

    def grammar(self) -> tuple[float, int]:
        self.writer_engine.reset()
        asked = [self.question(i, self.words(HEARD, i), "") for i in range(ANSWERS)]
        return self.write(self.writer_engine, asked)

    def no_grammar(self) -> tuple[float, int]:
        engine, waiting = self.plain, list(self.lengths)
        engine.reset()
        began = time.perf_counter()
        while waiting or engine.speaking:
            while waiting and engine.free:
                slot = engine.open(waiting[-1])
                engine.say(slot, self.words(HEARD, waiting[-1]), self.lengths[waiting.pop()])
            engine.dispatch()
            for turn in engine.collect():
                engine.close(turn.slot)
        return time.perf_counter() - began, engine.sampled

    def prefix(self, kind: str) -> tuple[float, int]:
        self.long_engine.reset()
        same = self.words(PREFIX, 10**6)
        asked = [self.question(i, same + self.words(HEARD, i), kind) for i in range(ANSWERS)]
        return self.write(self.long_engine, asked)

    def question(self, stream: int, prompt: list[int], kind: str) -> Question:
        return Question(stream, prompt, self.schema, SAID, Sampling(), kind)

    def write(self, engine: Engine, asked: list[Question]) -> tuple[float, int]:
        writer = Constrained(engine, self.grammars)
        began, tokens = time.perf_counter(), 0
        for question in asked:
            writer.ask(question.stream, question)
        while writer.busy:
            for stream, answer in writer.step().items():
                self.lengths[stream] = len(answer.tokens)
                Verdict.model_validate_json(answer.text)
                tokens += len(answer.tokens)
        return time.perf_counter() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    compile_cache.enable()
    bench = Bench(options.slots, options.width, options.layers)
    hashes = ", ".join(f"{k} {v}" for k, v in plain_hashes(bench.config, bench.short).items())
    print(f"plain path as StableHLO: {hashes}")
    print(f"{jax.devices()[0].device_kind}, {options}, {len(bench.tokenizer)} entries")
    cases = {
        "bursts": bench.bursts,
        "steps": bench.steps,
        "grammar": bench.grammar,
        "no grammar": bench.no_grammar,
        "prefix read once": lambda: bench.prefix("kind"),
        "prefix read each time": lambda: bench.prefix(""),
    }
    took: dict[str, list[float]] = {name: [] for name in cases}
    tokens = {}
    for counted in [False] + [True] * options.rounds:
        for name, play in cases.items():
            seconds, tokens[name] = play()
            if counted:
                took[name].append(seconds)
    seconds = {name: statistics.median(times) for name, times in took.items()}
    rate = {name: tokens[name] / seconds[name] for name in cases}
    print(f"{'':24}{'seconds':>9}{'tokens':>9}{'tokens/s':>10}")
    for name in cases:
        print(f"{name:24}{seconds[name]:9.3f}{tokens[name]:9,}{rate[name]:10,.0f}")
    for name, other in (("steps", "bursts"), ("grammar", "no grammar"), tuple(cases)[-2:]):
        print(f"{name}: {rate[name] / rate[other]:.2f}× of {other}")
    print(f"masks: {1e3 * bench.grammars.seconds / bench.grammars.calls:.2f} ms of a step")


if __name__ == "__main__":
    main()
