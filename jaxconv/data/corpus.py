"""What a run trains on and what it keeps apart to be measured with."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from jaxconv.data.conversation import Conversation, Message, PreferencePair
from jaxconv.data.sources import Source
from jaxconv.durable import publish
from jaxconv.errors import Refused

Record = TypeVar("Record")
Out = TypeVar("Out")


@dataclasses.dataclass(frozen=True)
class View(Sequence, Generic[Out]):
    """Some records of a source in another order or form, made when they are asked for."""

    source: Sequence
    indices: Sequence[int]
    make: Callable[[int], Out]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        """One record, or a view of a slice of them."""
        if isinstance(i, slice):
            return View(self.source, self.indices[i], self.make)
        return self.make(self.indices[i])


@dataclasses.dataclass(frozen=True)
class Corpus(Generic[Record]):
    """Records to train on, others that pick the weights which are kept, and again others that
    measure them: a number that has picked something is too good.

    `made_of` is the fingerprint of the files that they come from, empty where there are none.
    """

    train: Sequence[Record]
    validation: Sequence[Record]
    held_out: Sequence[Record]
    made_of: Mapping[str, str] = dataclasses.field(default_factory=dict)


def split(source: Sequence[Record], *, validation: int, held_out: int, seed: int) -> Corpus[Record]:
    """Random parts of so many records, and the rest to train on, each in the source's order.

    Every record is read for it, so the parts of a `Source` are kept with it.

    Records with the same `opening` stay together: data sets hold one talk at several depths, and a
    talk that training has seen would not be held out. A part may have a few records less for it.

    Raises:
        Refused: fewer than one record would be left to train on.
    """
    if isinstance(source, Source):
        parts, made_of = _kept_parts(source, validation, held_out, seed), source.made_of
    else:
        parts, made_of = _parts(source, validation, held_out, seed), {}
    return Corpus(*(View(source, part, source.__getitem__) for part in parts), made_of)


def _kept_parts(source: Source, validation: int, held_out: int, seed: int) -> list[np.ndarray]:
    path = source.kept / f"split-{validation}-{held_out}-{seed}.npz"
    if not path.is_file():
        parts = _parts(source, validation, held_out, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        with open(partial, "wb") as file:
            np.savez(file, *parts)
        publish(partial, path)
    return list(np.load(path).values())


def _parts(source: Sequence[Record], validation: int, held_out: int, seed: int) -> list[np.ndarray]:
    """int64 indices: to train on, to validate with, held out."""
    apart = validation + held_out
    if apart >= len(source):
        raise Refused(
            f"config.data.held_out={held_out} and config.data.validation={validation}; together "
            f"they must be below the number of records, {len(source)}"
        )
    talks: dict[str, list[int]] = {}
    for i in range(len(source)):
        talks.setdefault(opening(source[i]), []).append(i)
    order = list(talks.values())
    random.Random(f"held out {seed}").shuffle(order)
    parts: list[list[int]] = [[], [], []]  # held out, validation, train
    for talk in order:
        sizes = held_out - len(parts[0]), validation - len(parts[1]), len(source)
        parts[next(i for i, room in enumerate(sizes) if len(talk) <= room)] += talk
    named = ("held_out", held_out, parts[0]), ("validation", validation, parts[1])
    for name, size, part in named:
        if size and not part:
            raise Refused(
                f"config.data.{name}={size}; each of the {len(talks)} talks (records with the same "
                "first message) has more records, so it must be larger"
            )
    return [np.array(sorted(part), np.int64) for part in reversed(parts)]


def opening(record: Conversation | PreferencePair) -> str:
    """The system message and the first thing that the user says: what tells one talk from another.

    Of a record in which the user says nothing, its id.
    """
    messages = record.messages if isinstance(record, Conversation) else record.prompt
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        return record.id
    return "\n".join(m.content for m in messages[: first + 1] if m.role in ("system", "user"))


def exchange_replies(conversations: Sequence[Conversation], seed: int) -> Sequence[Conversation]:
    """The null control of fine-tuning: every conversation with the replies of another one.

    What is said stays as it was, but nothing that the user says has to do with it.
    """
    order = random.Random(f"exchange {seed}").sample(range(len(conversations)), len(conversations))
    partner = dict(zip(order, [*order[1:], order[0]], strict=True))

    def make(i: int) -> Conversation:
        own = conversations[i]
        others = assistant_replies(conversations[partner[i]])
        said: Iterator[Message] = (others[k % len(others)] for k in range(len(own.messages)))
        messages = tuple(next(said) if m.role == "assistant" else m for m in own.messages)
        return dataclasses.replace(own, messages=messages)

    return View(conversations, range(len(conversations)), make)


def assistant_replies(conversation: Conversation) -> list[Message]:
    """What the assistant says and which tools it calls, in order."""
    return [m for m in conversation.messages if m.role == "assistant"]


def last_exchange(conversation: Conversation) -> tuple[tuple[Message, ...], Message]:
    """(all that comes before the assistant's last message, that message)."""
    last = max(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
    return conversation.messages[:last], conversation.messages[last]


def shuffle_labels(
    pairs: Sequence[PreferencePair], seed: int, *, opposite: bool = False
) -> Sequence[PreferencePair]:
    """The null control of preferences: chosen and rejected are exchanged in a random half.

    Even labels that say nothing push a run a little to one side, by chance. The `opposite` labels,
    with the other half exchanged, push it to the other.
    """
    exchanged = set(random.Random(f"labels {seed}").sample(range(len(pairs)), len(pairs) // 2))
    if opposite:
        exchanged = set(range(len(pairs))) - exchanged

    def make(i: int) -> PreferencePair:
        pair = pairs[i]
        if i not in exchanged:
            return pair
        return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)

    return View(pairs, range(len(pairs)), make)


def chosen_conversation(pair: PreferencePair) -> Conversation:
    """The prompt and the reply that was preferred."""
    return Conversation(pair.id, (*pair.prompt, *pair.chosen), pair.meta)
