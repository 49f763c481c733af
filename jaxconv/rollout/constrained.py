"""Answers in JSON from one engine: questions wait, take slots as they come free and are written
token by token within their grammar.

What the prompts of one kind begin with is read once. What every answer begins with, because the
grammar leaves no choice, is read with the prompt; later such tokens are sampled like others, for a
slot that reads them as a piece of its own holds up all others.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxconv.rollout.engine import Engine, in_common
from jaxconv.rollout.grammar import Grammars, Writing
from jaxconv.rollout.shape import Sampling

_PREFIX = 16  # tokens; shared prefixes have a multiple


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        stream: of the randomness, below 2**32; the answer depends on it and on what follows alone.
        prompt: token ids.
        schema: of the JSON that answers.
        budget: most tokens of the answer; the prompt and they have to fit into a stream.
        sampling: how the answer is drawn.
        kind: questions of one kind begin alike; "" is of none.
    """

    stream: int
    prompt: list[int]
    schema: Mapping[str, Any]
    budget: int
    sampling: Sampling
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    """An answer.

    Attributes:
        text: JSON, all of it if it is `whole`.
        tokens: ids.
        logprobs: of each under the distribution that it was drawn from; 0 where the grammar left no
            choice.
        whole: whether it ended within its budget.
        gave_up: why the grammar engine did, in one line; "" where it did not.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    whole: bool
    gave_up: str = ""


@dataclasses.dataclass
class _Open:
    """An answer under way, or one that waits for a slot."""

    name: Any
    question: Question
    writing: Writing
    logprobs: list[float] = dataclasses.field(default_factory=list)

    def take(self, forced: Sequence[int]) -> bool:
        """Appends tokens that are certain, and says whether the model has something to add."""
        if len(forced) <= self.writing.left:
            self.writing.add(forced)
            self.logprobs += [0.0] * len(forced)
            return not self.writing.over
        return False

    @property
    def written(self) -> Written:
        writing = self.writing
        logprobs = self.logprobs[: len(writing.tokens)]
        return Written(writing.text, writing.tokens, logprobs, writing.done, writing.gave_up)


class Constrained:
    """Writes answers on an engine, which nobody else uses.

    Args:
        engine: with its weights.
        grammars: of its tokenizer.
    """

    def __init__(self, engine: Engine, grammars: Grammars):
        self._engine, self._grammars = engine, grammars
        self._waiting: collections.deque[_Open] = collections.deque()
        self._open: dict[int, _Open] = {}
        self._first: dict[str, list[int] | None] = {}  # prompt of a kind; None once it is shared

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._open)

    @property
    def room(self) -> int:
        """Questions that would begin at once."""
        return self._engine.free - len(self._waiting)

    def ask(self, name: Any, question: Question) -> None:
        """Puts a question in line; its answer comes under this name, which is hashable.

        Raises:
            Refused: no grammar can be made of its schema.
        """
        writing = self._grammars.begin(question.schema, question.budget)
        self._waiting.append(_Open(name, question, writing))

    def drop(self, name: Any) -> None:
        """Forgets a question whose answer nobody wants any more."""
        self._waiting = collections.deque(w for w in self._waiting if w.name != name)
        for slot, held in list(self._open.items()):
            if held.name == name:
                self._engine.end(slot)
                self._engine.close(slot)
                del self._open[slot]

    def step(self) -> dict[Any, Written]:
        """Goes on with every answer under way by a token, and begins those that have a slot;
        returns the answers that ended."""
        written = self._begin()
        if not self._open:
            return written
        engine = self._engine
        engine.read()
        writings = {slot: held.writing for slot, held in self._open.items()}
        allowed_BW = self._grammars.masks(writings, engine.shape.slots)
        engine.choose(allowed_BW, {s: held.question.sampling for s, held in self._open.items()})
        ended = {turn.slot: turn for turn in engine.collect()}
        for slot, held in list(self._open.items()):
            turn = ended.get(slot)
            if not held.writing.gave_up:
                held.writing.add((turn.tokens if turn else engine.said(slot))[-1:])
            if turn is None and not held.writing.over:
                continue
            held.logprobs += (turn or engine.end(slot)).logprobs
            engine.close(slot)
            del self._open[slot]
            written[held.name] = held.written
        return written

    def _begin(self) -> dict[Any, Written]:
        """Gives free slots to those who wait; returns the answers that need none, because a grammar
        leaves no choice in them."""
        self._share()
        written: dict[Any, Written] = {}
        while self._waiting and self._engine.free:
            held = self._waiting.popleft()
            forced = held.writing.forced()
            if not held.take(forced):
                written[held.name] = held.written
                continue
            slot = self._engine.open(held.question.stream)
            self._engine.say(slot, [*held.question.prompt, *forced], held.writing.left)
            self._open[slot] = held
        return written

    def _share(self) -> None:
        """Shares what the first two prompts of a kind begin with."""
        for held in self._waiting:
            kind, prompt = held.question.kind, held.question.prompt
            if not self._engine.free:
                return
            if not kind:
                continue
            first = self._first.setdefault(kind, prompt)
            if first is None or first == prompt:
                continue
            self._first[kind] = None
            same = min(in_common(first, prompt), len(prompt) - 1) // _PREFIX * _PREFIX
            if same:
                self._engine.share(prompt[:same])
