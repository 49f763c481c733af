"""Conversations and preference pairs as token ids with a role mask."""

import dataclasses
import enum
import json
from collections.abc import Sequence

import numpy as np

from jaxconv.data.conversation import Conversation, Message, PreferencePair
from jaxconv.data.template import ChatTemplate
from jaxconv.data.template_tools import Tools
from jaxconv.errors import Refused

POLICIES = ("truncate_left", "split", "leave_out", "refuse")
"""What becomes of what is too long. Cuts are made where an exchange begins, that is at a user's
message that follows the assistant, and every part keeps the system message.

- truncate_left: the oldest exchanges go; if the last one alone does not fit, it is left out.
- split: several examples, in which each of the assistant's turns is learned once; an exchange that
  does not fit alone is left out. A pair cannot be split; its prompt is truncated.
- leave_out: it is left out.
- refuse: the run is refused.
"""


class Outcome(enum.StrEnum):
    """What became of a record."""

    WHOLE = "whole"
    TRUNCATED = "truncated"
    SPLIT = "split"
    SPLIT_IN_PART = "split_in_part"
    LEFT_OUT = "left_out"
    NOTHING_SAID = "nothing_said"  # no message is the assistant's


@dataclasses.dataclass(frozen=True)
class TokenExample:
    """One stream of tokens.

    Attributes:
        tokens: int32 [n].
        mask: bool [n], what is to be learned; the first token never is.
    """

    tokens: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairExample:
    """Two streams whose first `prompt_length` tokens are the same and are not learned."""

    chosen: TokenExample
    rejected: TokenExample
    prompt_length: int


def encode(
    conversation: Conversation, template: ChatTemplate, *, max_length: int, policy: str
) -> tuple[list[TokenExample], Outcome]:
    """A conversation as streams of at most `max_length` tokens.

    The mask has the assistant's own words and the marker that ends each of its turns. Messages
    after its last turn are not in the stream: nothing is learned from them.

    Args:
        conversation: valid; see `conversation.check`.
        template: of the model's tokenizer.
        max_length: tokens of a stream.
        policy: one of `POLICIES`, for a longer conversation.

    Raises:
        Refused: by the policy; or the template does not render such a conversation.
    """
    _check_policy(policy)
    name = f"conversation {conversation.id!r}"
    spoken = _Spoken.of(conversation.messages, definitions(conversation), template, name)
    end = len(spoken.turns)
    if not end:
        return [], Outcome.NOTHING_SAID
    length = spoken.length(0, end)
    if length <= max_length:
        return [spoken.stream(0, end)], Outcome.WHOLE
    if policy == "refuse":
        raise _too_long(spoken.name, length, max_length)
    if policy == "split":
        return _split(spoken, max_length)
    for first in spoken.starts[1:] if policy == "truncate_left" else ():
        if spoken.length(first, end) <= max_length:
            return [spoken.stream(first, end)], Outcome.TRUNCATED
    return [], Outcome.LEFT_OUT


def encode_pair(
    pair: PreferencePair, template: ChatTemplate, *, max_length: int, policy: str
) -> tuple[PairExample | None, Outcome]:
    """A preference pair as two streams; the mask has the assistant's words after the prompt.

    Args:
        pair: valid; see `conversation.check`.
        template: of the model's tokenizer.
        max_length: tokens of both streams together.
        policy: one of `POLICIES`, for a longer pair.

    Returns None for a pair that is left out.

    Raises:
        Refused: as `encode`.
    """
    _check_policy(policy)
    chosen, rejected = (
        _Spoken.of(pair.prompt + answer, definitions(pair), template, f"pair {pair.id!r}")
        for answer in (pair.chosen, pair.rejected)
    )
    answer = sum(message.role == "assistant" for message in pair.prompt)
    for first in chosen.starts:
        if first > answer:
            break
        length = sum(spoken.length(first, len(spoken.turns)) for spoken in (chosen, rejected))
        if length <= max_length:
            streams = (
                spoken.stream(first, len(spoken.turns), learn=answer)
                for spoken in (chosen, rejected)
            )
            prompt_length = chosen.length(first, answer) + len(chosen.read(answer, first))
            outcome = Outcome.TRUNCATED if first else Outcome.WHOLE
            return PairExample(*streams, prompt_length), outcome
        if policy == "refuse":
            raise _too_long(chosen.name, length, max_length)
        if policy == "leave_out":
            break
    return None, Outcome.LEFT_OUT


def _split(spoken: "_Spoken", max_length: int) -> tuple[list[TokenExample], Outcome]:
    """As many exchanges in each part as fit."""
    bounds = [*spoken.starts, len(spoken.turns)]
    examples = []
    outcome = Outcome.SPLIT
    first = 0
    while first < len(spoken.starts):
        end = first
        while end + 1 < len(bounds) and (
            spoken.length(bounds[first], bounds[end + 1]) <= max_length
        ):
            end += 1
        if end == first:
            outcome = Outcome.SPLIT_IN_PART
            first += 1
        else:
            examples.append(spoken.stream(bounds[first], bounds[end]))
            first = end
    return examples, outcome if examples else Outcome.LEFT_OUT


def definitions(record: Conversation | PreferencePair) -> Tools:
    """The tools that a row defines beside its messages: `tools`, a list of objects or such a list
    as JSON text. Anything else by that name is none."""
    tools = record.meta.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return ()
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return tools if is_list else ()


@dataclasses.dataclass(frozen=True)
class _Spoken:
    """A conversation by the assistant's turns.

    Attributes:
        name: for messages to people.
        tools: that may be called.
        system: the system message, if there is one.
        heard: the messages before each turn, the system message not among them.
        turns: ids that were read before each turn, and those that were said.
    """

    name: str
    template: ChatTemplate
    tools: Tools
    system: tuple[Message, ...]
    heard: list[list[Message]]
    turns: list[tuple[list[int], list[int]]]

    @classmethod
    def of(
        cls, messages: Sequence[Message], tools: Tools, template: ChatTemplate, name: str
    ) -> "_Spoken":
        try:
            template.check_order(messages)
            turns = template.turns(messages, tools)
        except Refused as refused:
            raise Refused(f"{name}: {refused}") from None
        heard: list[list[Message]] = [[]]
        for message in messages:
            if message.role == "assistant":
                heard.append([])
            elif message.role != "system":
                heard[-1].append(message)
        system = tuple(message for message in messages if message.role == "system")
        return cls(name, template, tools, system, heard[:-1], turns)

    @property
    def starts(self) -> list[int]:
        """Turns with which an exchange begins: those after a user's message."""
        return [
            turn
            for turn, heard in enumerate(self.heard)
            if not turn or any(message.role == "user" for message in heard)
        ]

    def read(self, turn: int, first: int) -> list[int]:
        """What is read before a turn in a conversation that begins with turn `first`."""
        if turn > first or not first:
            return self.turns[turn][0]
        asked = [m for m in self.heard[turn] if m.role == "user"]  # a tool's answer has no call
        messages = [*self.system, *asked, Message("assistant", "")]
        ((read, _),) = self.template.turns(messages, self.tools)
        return read

    def length(self, first: int, end: int) -> int:
        """Tokens of a conversation of turns from `first` up to `end`."""
        return sum(len(self.read(t, first)) + len(self.turns[t][1]) for t in range(first, end))

    def stream(self, first: int, end: int, learn: int = 0) -> TokenExample:
        """Turns from `first` up to `end`; those from `learn` on are learned."""
        ids: list[int] = []
        mask: list[bool] = []
        for turn in range(first, end):
            read, said = self.read(turn, first), self.turns[turn][1]
            ids += read + said
            mask += [False] * len(read) + [turn >= learn] * len(said)
        mask[0] = False
        return TokenExample(np.array(ids, np.int32), np.array(mask, bool))


def _check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise Refused(f"policy {policy!r}; it must be one of {', '.join(POLICIES)}")


def _too_long(name: str, length: int, max_length: int) -> Refused:
    return Refused(f"{name} has {length} tokens; at most {max_length} are allowed")
